"""Every pipeline on the model that ships, through the command, as its first user runs it."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_pipelines import companions, media
from aiprod_pipelines.catalog import PIPELINES, find_pipeline
from aiprod_pipelines.cli import app
from aiprod_pipelines.recipe import read_recipe

PROMPT = "A large red ball bounces up and down in a grey room, with a dull thud."
LIMIT_S = 30.0  # of one clip, loading included; a few seconds on an idle laptop
STEPS = 3  # of guided pipelines
FRAMES = 9  # three latents: short, and still a clip with a first, a middle and an end
TWO_STAGES = ("two-stages", "two-stages-hq", "distilled", "ic-lora", "keyframes", "audio-to-video")


def generate(name: str, output: Path, *flags: object) -> dict:
    """The report of `aiprod generate --pipeline NAME --model nano ... --json`."""
    command = ["generate", PROMPT, "--model", "nano", "--pipeline", name, "--seed", 3, "--device",
               "cpu", "--json", "-o", output, *flags]  # fmt: skip
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A clip of nano's own, and its first and last frame."""
    folder = tmp_path_factory.mktemp("nano")
    clip = folder / "source.mp4"
    generate("one-stage", clip, "--num-frames", FRAMES, "--steps", STEPS)
    frames = list(media.read_frames(clip))
    paths = {"clip": clip, "first": folder / "first.png", "last": folder / "last.png"}
    Image.fromarray(frames[0]).save(paths["first"])
    Image.fromarray(frames[-1]).save(paths["last"])
    return paths


def flags_of(name: str, inputs: dict[str, Path]) -> list[object]:
    length = [] if name in ("retake", "extend") else ["--num-frames", FRAMES]
    steps = [] if find_pipeline(name).is_distilled else ["--steps", STEPS]
    first, last = inputs["first"], inputs["last"]
    own: dict[str, list[object]] = {
        "keyframes": ["--keyframe", f"{first}:0", "--keyframe", f"{last}:{FRAMES - 1}:0.8"],
        "ic-lora": ["--control", f"canny={inputs['clip']}"],
        "audio-to-video": ["--audio", inputs["clip"]],
        "retake": ["--source", inputs["clip"], "--start-time", 0.2, "--end-time", 0.5],
        "extend": ["--source", inputs["clip"], "--num-frames", 2 * FRAMES - 1],
    }
    return [*length, *steps, *own.get(name, [])]


def skip_unless_shipped(name: str, *, in_two_stages: bool = True) -> None:
    """Skips where nano lacks a file of the pipeline; live once that lies beside it."""
    pipeline = find_pipeline(name)
    checkpoint = pipeline.from_model("nano", device="cpu").models.checkpoint
    needs = []
    if in_two_stages:
        needs.append(("spatial upscaler", lambda: companions.spatial_upsampler(checkpoint, None)))
    if (in_two_stages or pipeline.is_distilled) and not companions.is_distilled(checkpoint):
        needs.append(("distilled LoRA", lambda: companions.distilled_lora(checkpoint, None)))
    if name == "ic-lora":
        needs.append(("canny IC-LoRA", lambda: companions.ic_lora(checkpoint, "canny")))
    for file, find in needs:
        try:
            find()
        except InputError:
            pytest.skip(f"nano has no {file} yet")


@pytest.mark.parametrize("name", PIPELINES)
def test_nano_runs_every_pipeline_from_the_command(
    name: str, inputs: dict[str, Path], tmp_path: Path
):
    if name in TWO_STAGES:
        skip_unless_shipped(name)
    output = tmp_path / ("sound.wav" if name == "text-to-audio" else "clip.mp4")
    started = time.monotonic()
    report = generate(name, output, *flags_of(name, inputs))
    assert time.monotonic() - started < LIMIT_S
    assert (report["model"], report["pipeline"], report["seed"]) == ("nano", name, 3)
    recipe = read_recipe(output)
    assert recipe["latents_sha256"] == report["latents_sha256"]
    assert [path.name for path in tmp_path.iterdir()] == [output.name]

    frames = 2 * FRAMES - 1 if name == "extend" else FRAMES
    sound = media.read_audio(output)
    assert sound.duration_s == pytest.approx(frames / 12, abs=0.13)  # AAC's padding
    assert np.isfinite(sound.samples).all() and np.abs(sound.samples).max() > 1e-3
    if name == "text-to-audio":
        return
    picture = np.stack(list(media.read_frames(output)))
    side = 128 if name in TWO_STAGES else 64
    assert picture.shape == (frames, side, side, 3)
    assert picture.std() > 5  # neither black nor one colour


@pytest.mark.parametrize("name", ["distilled", "ic-lora", "keyframes", "audio-to-video"])
def test_nano_runs_a_first_stage_alone_at_the_size_it_has_learnt(
    name: str, inputs: dict[str, Path], tmp_path: Path
):
    skip_unless_shipped(name, in_two_stages=False)
    report = generate(name, tmp_path / "clip.mp4", *flags_of(name, inputs), "--skip-stage-2")
    assert (report["width"], report["height"], report["num_frames"]) == (64, 64, FRAMES)


@pytest.mark.parametrize(
    "camera", ["dolly-in", "dolly-out", "dolly-left", "dolly-right", "jib-up", "jib-down", "static"]
)
def test_every_camera_lora_of_nano_fits_it(camera: str):
    checkpoint = find_pipeline("one-stage").from_model("nano", device="cpu").models.checkpoint
    try:
        file = companions.camera_lora(checkpoint, camera)
    except InputError:
        pytest.skip(f"nano has no camera LoRA {camera} yet")
    companions.check_lora(checkpoint, file)


@pytest.mark.parametrize("kind", ["canny", "depth", "pose", "detailer"])
def test_every_control_lora_of_nano_fits_it(kind: str):
    checkpoint = find_pipeline("ic-lora").from_model("nano", device="cpu").models.checkpoint
    try:
        file = companions.ic_lora(checkpoint, kind)
    except InputError:
        pytest.skip(f"nano has no IC-LoRA {kind} yet")
    companions.check_lora(checkpoint, file)
