"""The example workflows: well formed, and run node by node with a tiny model.

ComfyUI's own nodes have stand-ins here that take and give its types.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from aiprod_pipelines import media
from aiprod_pipelines.recipe import read_recipe

WORKFLOWS = sorted((Path(__file__).resolve().parents[1] / "workflows").glob("*.json"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MODEL = "tiny-dev.safetensors"


class Video:
    """ComfyUI's VIDEO, of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save_to(self, path: str) -> None:
        shutil.copy(self.path, path)


def stand_ins(comfy: SimpleNamespace) -> dict[str, Any]:
    """ComfyUI's nodes: inputs in the order of their widgets, outputs, function."""

    def load_image(image: str):
        pixels = torch.from_numpy(media.read_image(comfy.input / image).copy()).float() / 255
        return pixels[None], torch.zeros(1, *pixels.shape[:2])

    def load_audio(audio: str):
        sound = media.read_audio(comfy.input / audio)
        waveform = torch.from_numpy(sound.samples)[None]
        return ({"waveform": waveform, "sample_rate": sound.sample_rate},)

    def get_components(video: Video):
        frames = torch.from_numpy(np.stack([*media.read_frames(video.path)])).float() / 255
        return frames, None, media.probe(video.path).fps

    def create_video(images: torch.Tensor, audio: dict[str, Any], fps: float):
        assert images.dtype == torch.float32 and images.shape[-1] == 3
        assert images.min() >= 0 and images.max() <= 1
        channels, samples = audio["waveform"].shape[1:]
        assert channels == 2 and samples == round(len(images) / fps * audio["sample_rate"])
        path = comfy.temp / "created.mp4"
        media.write_video(path, [(images * 255).byte().numpy()], fps)
        return (Video(path),)

    def save_audio(audio: dict[str, Any], filename_prefix: str):
        samples = audio["waveform"][0].numpy()
        media.write_audio(comfy.output / "sound.flac", media.Audio(samples, audio["sample_rate"]))
        return ()

    def save_video(video: Video, filename_prefix: str, format: str, codec: str):
        video.save_to(str(comfy.output / "saved.mp4"))
        return ()

    return {
        "LoadImage": ({"image": "COMBO", "upload": "COMBO"}, ("IMAGE", "MASK"), load_image),
        "LoadAudio": ({"audio": "COMBO"}, ("AUDIO",), load_audio),
        "LoadVideo": (
            {"file": "COMBO", "upload": "COMBO"},
            ("VIDEO",),
            lambda file: (Video(comfy.input / file),),
        ),
        "GetVideoComponents": ({"video": "VIDEO"}, ("IMAGE", "AUDIO", "FLOAT"), get_components),
        "CreateVideo": (
            {"images": "IMAGE", "audio": "AUDIO", "fps": "FLOAT"},
            ("VIDEO",),
            create_video,
        ),
        "SaveVideo": (
            {"video": "VIDEO", "filename_prefix": "STRING", "format": "COMBO", "codec": "COMBO"},
            (),
            save_video,
        ),
        "SaveAudio": ({"audio": "AUDIO", "filename_prefix": "STRING"}, (), save_audio),
    }


class Graph:
    """A workflow as the page saves it, checked as ComfyUI checks it, and run from its outputs."""

    CONTROLS: ClassVar = ("fixed", "increment", "decrement", "randomize")

    def __init__(self, workflow: dict[str, Any], nodes: dict[str, Any], natives: dict[str, Any]):
        self.nodes, self.natives = nodes, natives
        self.placed = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        self.results: dict[int, tuple[Any, ...]] = {}
        assert workflow["last_node_id"] == max(self.placed)
        assert workflow["last_link_id"] == max(self.links)

    def inputs_of(self, kind: str) -> tuple[dict[str, tuple[Any, dict[str, Any]]], set[str]]:
        """(type, settings) of each input in order, and which are required."""
        if kind in self.natives:
            inputs = self.natives[kind][0]
            return {name: (type_, {}) for name, type_ in inputs.items()}, set()
        types = self.nodes[kind].INPUT_TYPES()
        every = types["required"] | types.get("optional", {})
        return {
            name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in every.items()
        }, set(types["required"])

    def returns_of(self, kind: str) -> tuple[str, ...]:
        return self.natives[kind][1] if kind in self.natives else self.nodes[kind].RETURN_TYPES

    def arguments(self, node: dict[str, Any]) -> dict[str, Any]:
        """Widgets' values and links' sources, each checked against the node's inputs."""
        inputs, required = self.inputs_of(node["type"])
        values = list(node["widgets_values"])
        given: dict[str, Any] = {}
        for name, (accepted, settings) in inputs.items():
            if isinstance(accepted, list) or accepted in WIDGETS:
                given[name] = value = values.pop(0)
                if isinstance(accepted, list):
                    is_ours = (node["type"], name) == ("AIPRODLoadModel", "model")
                    assert value in accepted, (node["type"], name, value)
                    given[name] = MODEL if is_ours else value
                if accepted in ("INT", "FLOAT") and settings:
                    assert settings["min"] <= value <= settings["max"], (node["type"], name)
                if settings.get("control_after_generate"):
                    assert values.pop(0) in self.CONTROLS
        assert values == [], node["type"]
        for slot, socket in enumerate(node["inputs"]):
            accepted, _ = inputs[socket["name"]]
            assert socket["type"] == ("COMBO" if isinstance(accepted, list) else accepted)
            if socket["link"] is None:
                continue
            _, source, output, target, target_slot, type_ = self.links[socket["link"]]
            assert (target, target_slot, type_) == (node["id"], slot, accepted)
            assert self.returns_of(self.placed[source]["type"])[output] == accepted
            assert socket["link"] in self.placed[source]["outputs"][output]["links"]
            given[socket["name"]] = (source, output)
        assert required <= given.keys(), node["type"]
        given.pop("upload", None)
        return given

    def run(self) -> None:
        for node in self.placed.values():
            self.result(node["id"])

    def result(self, node_id: int) -> tuple[Any, ...]:
        if node_id not in self.results:
            node = self.placed[node_id]
            linked = {socket["name"] for socket in node["inputs"] if socket["link"] is not None}
            arguments = self.arguments(node)
            for name in linked:
                source, output = arguments[name]
                arguments[name] = self.result(source)[output]
            kind = node["type"]
            if kind in self.natives:
                self.results[node_id] = self.natives[kind][2](**arguments)
            else:
                function = getattr(self.nodes[kind](), self.nodes[kind].FUNCTION)
                self.results[node_id] = function(**arguments)
        return self.results[node_id]


@pytest.fixture
def graph(request: pytest.FixtureRequest, comfy: SimpleNamespace, nodes: dict[str, Any]) -> Graph:
    t, y, x = np.mgrid[:18, :36, :52]
    frames = np.stack([x * 4, y * 5, t * 12], -1).astype(np.uint8)
    times = np.arange(24000) / 16000
    sound = media.Audio(np.tile(0.3 * np.sin(2764 * times), (2, 1)).astype(np.float32), 16000)
    media.write_video(comfy.input / "source.mp4", [frames], 12, audio=sound)
    media.write_audio(comfy.input / "sound.wav", sound)
    Image.fromarray(frames[0]).save(comfy.input / "first.png")
    Image.fromarray(frames[-1]).save(comfy.input / "last.png")
    workflow = json.loads(request.param.read_text())
    return Graph(workflow, nodes, stand_ins(comfy))


@pytest.mark.parametrize("graph", WORKFLOWS, ids=lambda path: path.stem, indirect=True)
def test_a_workflow_is_well_formed_and_makes_its_file(graph: Graph, comfy: SimpleNamespace):
    assert {
        link for node in graph.placed.values() for s in node["inputs"] if (link := s["link"])
    } == {*graph.links}
    graph.run()
    made = [path for path in comfy.output.rglob("*") if path.is_file()]
    assert made
    for path in made:
        info = media.probe(path)
        assert info.duration_s > 0.5
        if path.parent.name == "video":  # saved with its recipe
            (sampled,) = (
                node
                for node in graph.placed.values()
                if node["type"] in ("AIPRODSample", "AIPRODRetake", "AIPRODExtend")
            )
            recipe = read_recipe(path)
            assert recipe["pipeline"] in (*sampled["widgets_values"], "retake", "extend")
            assert info.audio_codec is not None
