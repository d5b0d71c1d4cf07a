"""Windows, tiles and negative prompts without CFG, through whole recipes on the tiny model."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_core.model.transformer import Transformer
from aiprod_core.types import ScaleFactors, VideoShape
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.cli import app
from aiprod_pipelines.recipe import read_recipe
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.tiles import choose_refine_tile, refine_tiles

PROMPT = "a red ball bounces"
SCALE = ScaleFactors(8, 32, 32)


def open_pipeline(name: str, folder: Path):
    return find_pipeline(name).from_model(str(folder / "tiny-dev.safetensors"), device="cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """The tokens of each modality that the transformer is given, call by call."""
    seen = []
    original = Transformer.forward

    def forward(self, video, audio, perturbations=None):
        seen.append(tuple(0 if m is None else m.latent.shape[1] for m in (video, audio)))
        return original(self, video, audio, perturbations)

    monkeypatch.setattr(Transformer, "forward", forward)
    return seen


@pytest.mark.parametrize("name", ["one-stage", "distilled"])
def test_a_window_that_holds_the_clip_gives_the_plain_clip(name: str, tiny_family: Path):
    pipeline = open_pipeline(name, tiny_family)
    plain, windowed = (pipeline(PROMPT, window_frames=frames) for frames in (None, 9))
    assert torch.equal(plain.latents.video, windowed.latents.video)
    assert torch.equal(plain.latents.audio, windowed.latents.audio)


@pytest.mark.parametrize("sampler", ["euler", "res-2s"])
def test_a_long_clip_goes_on_from_its_beginning_with_no_more_tokens_a_call(
    sampler: str, tiny_family: Path, calls: list
):
    pipeline = open_pipeline("one-stage", tiny_family)
    short = pipeline(PROMPT, num_frames=17, sampler=sampler)
    most = max(calls)
    calls.clear()
    settings = {"num_frames": 41, "window_frames": 17, "window_overlap": 4}
    long = pipeline(PROMPT, sampler=sampler, **settings)
    assert long.latents.video.shape[2] == 11
    assert long.latents.audio.shape[2] == round(41 / 12 * 25)
    # The second window throws its first latent away and is carried the second: four stay.
    assert torch.equal(long.latents.video[:, :, :5], short.latents.video)
    own = short.latents.audio.shape[2]
    kept = own - round(4 / 12 * 25 / 2) - 1
    assert torch.equal(long.latents.audio[:, :, :kept], short.latents.audio[:, :, :kept])
    assert {video for video, _ in calls} == {most[0]}
    assert max(audio for _, audio in calls) <= most[1] + 2
    assert len({latent.item() for latent in long.latents.video[0, 0, :, 0, 0]}) == 11


def test_the_last_window_is_another_where_the_first_has_an_image(tiny_family: Path, picture: Path):
    pipeline = open_pipeline("one-stage", tiny_family)
    settings = {"num_frames": 41, "window_frames": 17, "window_overlap": 8}
    a, b = (pipeline(PROMPT, images=images, **settings) for images in ((), (picture,)))
    # The same noise in both: only what is carried from window to window differs.
    assert not torch.equal(a.latents.video[:, :, -1], b.latents.video[:, :, -1])
    assert not torch.equal(a.latents.audio[:, :, -1], b.latents.audio[:, :, -1])


@pytest.mark.parametrize(
    "name", ["two-stages", "keyframes", "ic-lora", "audio-to-video", "text-to-audio", "retake"]
)
def test_every_kind_of_recipe_takes_windows(
    name: str, tiny_family: Path, picture: Path, source_clip: Path
):
    inputs = {
        "keyframes": {"keyframes": [(picture, 0), (picture, 16)]},
        "ic-lora": {"controls": [("canny", source_clip)]},
        "audio-to-video": {"audio": source_clip},
        "retake": {"source": source_clip, "start_time": 1.0},
    }.get(name, {})
    settings = {"num_frames": 17, "window_frames": 13, "window_overlap": 4, **inputs}
    clip = open_pipeline(name, tiny_family)(PROMPT, num_inference_steps=STEPS.get(name), **settings)
    for latent in (clip.latents.video, clip.latents.audio):
        assert latent is None or latent.isfinite().all()
    if name != "text-to-audio":
        assert clip.latents.video.shape[2] == 5
    assert clip.latents.audio.shape[2] == round(17 / 12 * 25)


STEPS = {"two-stages": 1, "keyframes": 1, "audio-to-video": 1}


@pytest.mark.parametrize("name", ["two-stages", "distilled"])
def test_a_second_stage_in_one_tile_is_the_whole_and_in_more_sees_less_at_once(
    name: str, tiny_family: Path, calls: list
):
    pipeline = open_pipeline(name, tiny_family)
    steps = 1 if name == "two-stages" else None
    whole, one, four = (
        pipeline(PROMPT, refine_tile=tile, num_inference_steps=steps)
        for tile in ("off", "96x64", "64x48")
    )
    assert torch.equal(whole.latents.video, one.latents.video)
    assert torch.equal(whole.latents.audio, one.latents.audio)
    assert calls[-1][0] == 3 * 6 * 8  # three latent frames of 6 x 8
    assert max(calls)[0] == 3 * 8 * 12
    difference = (four.latents.video - whole.latents.video).abs().mean()
    assert 0 < difference < 0.3 * whole.latents.video.abs().mean()


def test_the_recipe_holds_the_tile_that_was_chosen(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipeline = open_pipeline("two-stages", tiny_family)
    assert pipeline.resolve(GenerationRequest(PROMPT)).refine_tile == "off"
    monkeypatch.setattr("aiprod_pipelines.components.ModelSet.free_memory", lambda self: 0)
    clip = pipeline(PROMPT, num_inference_steps=1, num_frames=1, width=256, height=192)
    # The smallest: 12 latents of 8 pixels a side.
    assert clip.request.refine_tile == "96x96"
    monkeypatch.undo()
    path = clip.save(tmp_path / "clip.mp4")
    again = pipeline.run(GenerationRequest.from_dict(read_recipe(path)["request"]))
    assert torch.equal(again.latents.video, clip.latents.video)


def test_tiles_of_a_second_stage_are_as_large_as_memory_allows():
    def choose(gib: float, size=(121, 1088, 1920), spec="auto") -> str:
        options = {"element_bytes": 2, "free_bytes": int(gib * 2**30)}
        return choose_refine_tile(spec, 4096, SCALE, size, **options)

    assert choose(80) == "off"
    tokens = []
    for gib in (80, 10, 5, 2, 1, 0):
        spec = choose(gib)
        width, height = (1920, 1088) if spec == "off" else map(int, spec.split("x"))
        tokens.append(width // 32 * height // 32)
        assert tokens[-1] * 16 * 4096 * 2 * 42 <= max(gib * 2**30, 12 * 12 * 16 * 4096 * 2 * 42)
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] == 144
    assert choose(0, (9, 256, 1920)) == "384x256"  # a side that is short stays whole
    assert choose(0, spec="512x256") == "512x256"
    with pytest.raises(InputError, match=r"tile width must be a multiple of 32.*got 500, try 512"):
        choose(0, spec="500x256")
    weights = refine_tiles("384x256", SCALE, VideoShape(1, 9, 256, 1920, 24.0))
    assert weights is not None and weights.shape[1:] == (8, 60)


def test_negative_prompts_work_without_cfg_and_scale_1_is_off(tiny_family: Path):
    pipeline = open_pipeline("distilled", tiny_family)
    settings = {"skip_stage_2": True, "negative_prompt": "grey rain"}
    plain = pipeline(PROMPT, skip_stage_2=True)
    off = pipeline(PROMPT, nag_scale=1.0, **settings)
    assert torch.equal(off.latents.video, plain.latents.video)
    away = pipeline(PROMPT, nag_scale=6.0, **settings)
    assert not torch.equal(away.latents.video, plain.latents.video)
    assert not torch.equal(away.latents.audio, plain.latents.audio)
    other = pipeline(PROMPT, nag_scale=6.0, **{**settings, "negative_prompt": "a blue ball"})
    assert not torch.equal(other.latents.video, away.latents.video)
    same = pipeline(PROMPT, nag_scale=6.0, **{**settings, "negative_prompt": PROMPT})
    assert torch.allclose(same.latents.video, plain.latents.video, atol=1e-4)
    sound_only = pipeline(PROMPT, nag_scale=(1.0, 6.0), **settings)
    assert not torch.equal(sound_only.latents.audio, plain.latents.audio)
    assert torch.equal(pipeline(PROMPT, skip_stage_2=True).latents.video, plain.latents.video)


def test_both_stages_are_guided_from_the_command_and_the_recipe_replays(
    tiny_family: Path, tmp_path: Path
):
    arguments = [
        "generate", PROMPT, "-m", tiny_family / "tiny-dev.safetensors", "-p", "distilled",
        "--device", "cpu", "--nag-scale", "video=5,audio=3", "--negative-prompt", "grey rain",
        "--num-frames", 17, "--window-frames", 13, "--refine-tile", "64x48",
        "-o", tmp_path / "clip.mp4",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    request = read_recipe(tmp_path / "clip.mp4")["request"]
    assert request["nag_scale"] == {"video": 5.0, "audio": 3.0}
    assert (request["window_frames"], request["window_overlap"]) == (13, 4)
    assert request["refine_tile"] == "64x48"
    check = CliRunner().invoke(app, ["replay", str(tmp_path / "clip.mp4"), "--check", "--json"])
    assert check.exit_code == 0, check.output
    assert json.loads(check.stdout.splitlines()[-1])["same"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nag_scale": 5.0}, "nag_scale is for models that run without cfg_scale"),
        ({"window_frames": 8}, "window_frames must be 4k.1; got 8, try 9"),
        ({"window_frames": 9, "window_overlap": 6}, "multiple of 4, at least 4; got 6, try 8"),
        ({"window_frames": 9, "window_overlap": 8, "num_frames": 17}, "try window_frames 17"),
        ({"window_overlap": 8}, "goes with window_frames"),
        ({"refine_tile": "64"}, 'auto, off or WIDTHxHEIGHT; got "64"'),
    ],
)
def test_what_cannot_work_is_refused(settings, message, tiny_family: Path):
    with pytest.raises(InputError, match=message):
        open_pipeline("one-stage", tiny_family)(PROMPT, **settings)
