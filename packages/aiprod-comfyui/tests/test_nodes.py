"""The contract that ComfyUI holds nodes to, and what the nodes make."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_pipelines.catalog import PIPELINES, find_pipeline
from aiprod_pipelines.recipe import read_recipe

Nodes = dict[str, Any]
PROMPT = "a red ball bounces"
NATIVE = {"IMAGE", "AUDIO", "VIDEO", "LATENT", "INT", "FLOAT", "STRING", "BOOLEAN"}
OURS = {"AIPROD_MODEL", "AIPROD_TEXT", "AIPROD_CONDITIONS"}


def run(nodes: Nodes, name: str, **inputs: Any) -> Any:
    """Calls a node as ComfyUI does; widgets that are not given have their defaults."""
    types = nodes[name].INPUT_TYPES()
    defaults = {}
    for kind, *options in (types["required"] | types.get("optional", {})).items():
        accepted, *rest = options[0]
        settings = rest[0] if rest else {}
        if isinstance(accepted, list):
            defaults[kind] = settings.get("default", accepted[0] if accepted else None)
        elif "default" in settings:
            defaults[kind] = settings["default"]
    return getattr(nodes[name](), nodes[name].FUNCTION)(**defaults | inputs)


@pytest.fixture
def model(nodes: Nodes, comfy: SimpleNamespace) -> Any:
    return run(nodes, "AIPRODLoadModel", model="tiny-dev.safetensors")[0]


@pytest.fixture
def text(nodes: Nodes, model: Any) -> Any:
    return run(nodes, "AIPRODTextEncode", model=model, prompt=PROMPT)[0]


def test_the_package_is_imported_quickly_and_without_torch():
    folder = Path(__file__).resolve().parents[1]
    code = f"""
import importlib.util, sys, time
started = time.process_time()
spec = importlib.util.spec_from_file_location("aiprod_comfyui", {str(folder / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["aiprod_comfyui"] = module
spec.loader.exec_module(module)
assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
heavy = {{"torch", "numpy", "av", "PIL"}} & sys.modules.keys()
assert not heavy, heavy
print(time.process_time() - started)
"""
    seconds = float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    )
    assert seconds < 0.5


@pytest.mark.parametrize("has_comfy", [False, True])
def test_nodes_declare_what_comfyui_asks_of_them(
    nodes: Nodes, has_comfy: bool, request: pytest.FixtureRequest
):
    if has_comfy:
        request.getfixturevalue("comfy")
    for name, node in nodes.items():
        types = node.INPUT_TYPES()
        assert types.keys() <= {"required", "optional"} and node.CATEGORY.startswith("AIPROD")
        inputs = types["required"] | types.get("optional", {})
        for field, (accepted, *rest) in inputs.items():
            assert isinstance(accepted, list) or accepted in NATIVE | OURS, (name, field)
            if rest and "default" in rest[0] and accepted in ("INT", "FLOAT"):
                settings = rest[0]
                assert settings["min"] <= settings["default"] <= settings["max"], (name, field)
            if isinstance(accepted, list) and rest:
                assert rest[0]["default"] in accepted, (name, field)
        assert set(node.RETURN_TYPES) <= NATIVE | OURS
        assert node.RETURN_TYPES or node.OUTPUT_NODE
        function = inspect.signature(getattr(node(), node.FUNCTION))
        function.bind(**dict.fromkeys(types["required"]))
        function.bind(**dict.fromkeys(inputs))


def test_every_pipeline_can_be_sampled(nodes: Nodes):
    (choices,) = nodes["AIPRODSample"].INPUT_TYPES()["required"]["pipeline"]
    assert sorted([*choices, "retake", "extend"]) == sorted(PIPELINES)


def test_a_node_samples_what_python_samples(nodes: Nodes, model: Any, text: Any, family: Path):
    (latent,) = run(
        nodes, "AIPRODSample", model=model, text=text, pipeline="one-stage", seed=3, cfg_scale=2.0
    )
    pipeline = find_pipeline("one-stage").from_model(
        str(family / "tiny-dev.safetensors"), device="cpu"
    )
    clip = pipeline(PROMPT, seed=3, cfg_scale=2.0)
    assert torch.equal(latent["samples"], clip.latents.video)
    assert torch.equal(latent["audio"], clip.latents.audio)
    images, audio, fps = run(nodes, "AIPRODDecode", samples=latent)
    assert (images.shape, images.dtype, fps) == ((9, 32, 48, 3), torch.float32, 12)
    assert torch.equal(images * 255, torch.cat([*clip.frames()]).float())
    assert audio["waveform"].shape == (1, 2, round(9 / 12 * audio["sample_rate"]))
    assert torch.equal(audio["waveform"][0], torch.from_numpy(clip.audio.samples))


@pytest.mark.parametrize("pipeline", ["distilled", "two-stages-hq"])
def test_pipelines_that_no_workflow_shows_are_sampled_too(
    nodes: Nodes, model: Any, text: Any, pipeline: str
):
    (latent,) = run(nodes, "AIPRODSample", model=model, text=text, pipeline=pipeline, steps=8)
    assert latent["samples"].shape == (1, 8, 3, 8, 12)  # twice the model's own size


def test_the_saved_file_carries_the_recipe(
    nodes: Nodes, model: Any, text: Any, comfy: SimpleNamespace
):
    (latent,) = run(nodes, "AIPRODSample", model=model, text=text, seed=11, steps=2)
    shown = run(nodes, "AIPRODSave", samples=latent, filename_prefix="video/test")["ui"]["images"]
    path = comfy.output / shown[0]["subfolder"] / shown[0]["filename"]
    recipe = read_recipe(path)
    assert recipe["request"]["seed"] == 11 and recipe["request"]["prompt"] == PROMPT


def test_edited_samples_are_decoded_as_they_are_and_foreign_ones_refused(
    nodes: Nodes, model: Any, text: Any
):
    (latent,) = run(nodes, "AIPRODSample", model=model, text=text, steps=1)
    as_made = run(nodes, "AIPRODDecode", samples=latent)[0]
    edited = run(nodes, "AIPRODDecode", samples={**latent, "samples": latent["samples"] * 0})[0]
    assert not torch.equal(as_made, edited)
    with pytest.raises(InputError, match="not sampled by an AIPROD node"):
        run(nodes, "AIPRODDecode", samples={"samples": latent["samples"]})


def test_a_lora_changes_the_clip_and_leaves_the_model_as_it_was(
    nodes: Nodes, model: Any, text: Any
):
    def sampled(used: Any) -> torch.Tensor:
        return run(nodes, "AIPRODSample", model=used, text=text, steps=2)[0]["samples"]

    before = sampled(model)
    (adapted,) = run(nodes, "AIPRODLoadLora", model=model, lora="style.safetensors", strength=2.0)
    assert not torch.equal(sampled(adapted), before)
    assert torch.equal(sampled(model), before)


def test_the_same_picture_is_the_same_file(nodes: Nodes, model: Any, text: Any):
    image = torch.rand(1, 20, 30, 4, generator=torch.Generator().manual_seed(0))

    def given() -> dict[str, Any]:
        (conditions,) = run(nodes, "AIPRODAddImage", image=image, frame=4, strength=0.5)
        inputs = {"model": model, "text": text, "conditions": conditions, "steps": 1}
        (latent,) = run(nodes, "AIPRODSample", **inputs)
        return latent["aiprod_clip"].request.to_dict()["images"]

    first = given()
    assert given() == first
    assert [(i["frame"], i["strength"]) for i in first] == [(4, 0.5)]
    assert Path(first[0]["path"]).is_file()


def test_the_words_are_encoded_once(nodes: Nodes, model: Any, text: Any, monkeypatch: Any):
    def refuse() -> None:
        raise AssertionError("the text encoder is not needed")

    models = model.pipeline("one-stage").models
    monkeypatch.setattr(models, "text_encoder", refuse)
    run(nodes, "AIPRODSample", model=model, text=text, steps=1)


def test_each_stage_has_a_bar_that_fills(
    nodes: Nodes, model: Any, text: Any, comfy: SimpleNamespace
):
    comfy.bars.clear()
    run(nodes, "AIPRODSample", model=model, text=text, steps=3)
    assert (3, 3) in [(bar.total, bar.done) for bar in comfy.bars]


def test_an_interrupted_sampler_stops_after_its_step(
    nodes: Nodes, model: Any, text: Any, comfy: SimpleNamespace
):
    comfy.bars.clear()
    comfy.is_interrupted = lambda: any(bar.done == 2 for bar in comfy.bars)
    with pytest.raises(comfy.Interrupted):
        run(nodes, "AIPRODSample", model=model, text=text, steps=50)
    assert max(bar.done for bar in comfy.bars) == 2
