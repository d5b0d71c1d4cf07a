"""Every recipe from request to clip with a tiny random model: what is kept, and from what."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from aiprod_core.components import noisers
from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.lora import open_lora
from aiprod_pipelines import encoding, ic_lora, media, stages
from aiprod_pipelines.catalog import PIPELINES, find_pipeline
from aiprod_pipelines.cli import app
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.recipe import read_recipe
from aiprod_pipelines.request import GenerationRequest

PROMPT = "a red ball bounces"


def open_pipeline(name: str, folder: Path, file: str = "tiny-dev.safetensors"):
    return find_pipeline(name).from_model(str(folder / file), device="cpu")


def flags_of(name: str, picture: Path, clip: Path) -> list[object]:
    return {
        "two-stages-hq": ["--steps", 2],
        "keyframes": ["--keyframe", f"{picture}:0", "--keyframe", f"{picture}:8:0.5"],
        "ic-lora": ["--control", f"canny={clip}"],
        "audio-to-video": ["--audio", clip],
        "retake": ["--source", clip, "--start-time", 0.5, "--end-time", 0.8],
        "extend": ["--source", clip],
    }.get(name, [])


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_runs_from_the_command_and_its_recipe_makes_the_clip_again(
    name: str, tiny_family: Path, picture: Path, source_clip: Path, tmp_path: Path
):
    path, model = tmp_path / "clip.mp4", tiny_family / "tiny-dev.safetensors"
    arguments = [
        "generate", PROMPT, "--pipeline", name, "-m", model, "-o", path, "--seed", 3,
        "--device", "cpu", "--json", *flags_of(name, picture, source_clip),
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    info, recipe = media.probe(path), read_recipe(path)
    assert report["pipeline"] == recipe["pipeline"] == name
    assert (info.width, info.height) == (report["width"], report["height"])
    assert (info.num_frames or 0) == report["num_frames"]
    assert info.audio_sample_rate == report["audio_sample_rate"] == 16000
    request = GenerationRequest.from_dict(recipe["request"])
    assert recipe["inputs"].keys() == {str(path) for path in request.input_files}
    again = open_pipeline(name, tiny_family).run(request)
    assert again.recipe["latents_sha256"] == recipe["latents_sha256"]


def test_the_list_explains_every_pipeline_that_there_is():
    listed = json.loads(CliRunner().invoke(app, ["pipelines", "list", "--json"]).stdout)
    assert [entry["name"] for entry in listed] == list(PIPELINES)
    assert all(find_pipeline(entry["name"]).name == entry["name"] for entry in listed)
    table = CliRunner().invoke(app, ["pipelines", "list"]).stdout
    assert all(name in table for name in PIPELINES)
    with pytest.raises(InputError, match="got retakes, try retake"):
        find_pipeline("retakes")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list:
    """The states that every stage starts from, with its noise scale."""
    seen = []

    def spy(video, audio, **kwargs):
        seen.append((video, audio, kwargs["noise_scale"]))
        return noisers.noisy_start(video, audio, **kwargs)

    monkeypatch.setattr("aiprod_core.components.denoising.noisy_start", spy)
    return seen


@pytest.mark.parametrize("name", ["two-stages", "two-stages-hq", "distilled", "keyframes"])
def test_stage_2_starts_from_the_upsampled_latent(name, tiny_family, picture, starts, monkeypatch):
    upsampled = []
    original = stages.upsample

    def spy(models, request, windows, progress):
        for made in windows:
            upsampled.append((made.clip, next(original(models, request, [made], progress))))
            yield upsampled[-1][1]

    monkeypatch.setattr(stages, "upsample", spy)
    steps = 1 if name == "two-stages-hq" else None
    keyframes = [(picture, 0), (picture, 8, 0.5)] if name == "keyframes" else []
    open_pipeline(name, tiny_family)(PROMPT, keyframes=keyframes, num_inference_steps=steps)
    (_, _, scale_1), (video, audio, scale_2) = starts
    ((stage_1, tokens),) = upsampled
    assert (scale_1, scale_2) == (pytest.approx(1.0), pytest.approx(0.909375))
    assert stage_1.video.shape == (1, 8, 3, 4, 6)  # half of the doubled default size
    assert tokens.video.shape == (1, 3 * 8 * 12, 8)
    assert torch.equal(video.latent[:, : 3 * 8 * 12], tokens.video)
    assert torch.equal(audio.latent, stage_1.audio.transpose(1, 2).flatten(2))


def test_a_model_may_start_its_second_stage_lower(tiny_family: Path, starts):
    pipeline = open_pipeline("distilled", tiny_family)
    pipeline.models.profile = pipeline.models.profile.replaced({"stage_2_sigmas": [0.15, 0.07]})
    clip = pipeline(PROMPT)
    assert starts[1][2] == pytest.approx(0.15)
    assert clip.request.stage_2_sigmas == (0.15, 0.07)


@pytest.mark.parametrize(
    ("name", "keeps"), [("two-stages", True), ("two-stages-hq", True), ("distilled", False)]
)
def test_guided_pipelines_return_the_sound_of_stage_1(name, keeps, tiny_family, starts):
    steps = None if name == "distilled" else 1
    clip = open_pipeline(name, tiny_family)(PROMPT, num_inference_steps=steps)
    stage_1_sound = starts[1][1].latent
    sound = clip.latents.audio.transpose(1, 2).flatten(2)
    assert torch.equal(sound, stage_1_sound) == keeps


def test_the_distilled_lora_is_in_the_weights_of_stage_2_only_and_then_taken_out(
    tiny_family, monkeypatch
):
    pipeline = open_pipeline("two-stages", tiny_family)
    with pipeline.models.transformer() as transformer:
        weight = transformer.transformer_blocks[0].attn1.to_q.weight
        before = weight.clone()
        seen = []
        original = stages.denoising.denoise
        monkeypatch.setattr(
            stages.denoising,
            "denoise",
            lambda *args, **kwargs: seen.append(weight.clone()) or original(*args, **kwargs),
        )
        pipeline(PROMPT)
        assert torch.equal(seen[0], before)
        assert not torch.equal(seen[1], before)
        assert torch.equal(transformer.transformer_blocks[0].attn1.to_q.weight, before)


def test_a_distilled_checkpoint_needs_no_lora(tiny_family: Path):
    dev = open_pipeline("distilled", tiny_family)(PROMPT)
    assert dev.request.distilled_lora is not None
    own = open_pipeline("distilled", tiny_family, "tiny-distilled.safetensors")(PROMPT)
    assert own.request.distilled_lora is None
    assert not torch.equal(own.latents.video, dev.latents.video)


def test_one_stage_alone_makes_the_full_size(tiny_family: Path, starts):
    clip = open_pipeline("distilled", tiny_family)(PROMPT, skip_stage_2=True)
    assert len(starts) == 1
    assert clip.latents.video.shape == (1, 8, 3, 4, 6)
    assert (clip.request.height, clip.request.spatial_upsampler) == (32, None)


def test_keyframes_of_strength_1_stay_and_weaker_ones_move(tiny_family, picture, monkeypatch):
    results = []
    original = stages.denoising.denoise
    monkeypatch.setattr(
        stages.denoising,
        "denoise",
        lambda *args, **kwargs: (
            results.append((args[2].state, original(*args, **kwargs))) or results[-1][1]
        ),
    )
    pipeline = open_pipeline("keyframes", tiny_family)
    pipeline(PROMPT, keyframes=[(picture, 0), (picture, 8, 0.5)], skip_stage_2=True)
    state, x = results[0]
    own, frame = 3 * 4 * 6, 4 * 6
    exact, weak = slice(own, own + frame), slice(own + frame, own + 2 * frame)
    assert x.video.shape[1] == own + 2 * frame
    assert torch.equal(state.denoise_mask[0, :, 0].unique(), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(x.video[:, exact], state.clean_latent[:, exact], atol=1e-6)
    assert not torch.allclose(x.video[:, weak], state.clean_latent[:, weak], atol=1e-2)
    assert float(state.positions[0, 0, own + frame, 0]) == pytest.approx(8 / 12)


@pytest.mark.parametrize("sampler", ["euler", "heun", "res-2s", "dpmpp-2m-sde"])
@pytest.mark.parametrize("modality", ["video", "audio", "both"])
def test_a_retake_leaves_tokens_outside_the_span_bit_for_bit(
    modality: str, sampler: str, tiny_family: Path, source_clip: Path
):
    pipeline = open_pipeline("retake", tiny_family)
    settings = {"source": source_clip, "start_time": 0.5, "end_time": 0.8, "modality": modality}
    clip = pipeline(PROMPT, sampler=sampler, **settings)
    shape = clip.request.shape
    assert (shape.num_frames, shape.height, shape.width, shape.fps) == (17, 32, 48, 12)
    with torch.inference_mode():
        source = encoding.encode_source(pipeline.models, clip.request, Progress(), is_whole=True)
    # Latent k > 0 covers frames 4k-3 to 4k at 12 a second: 0.5 to 0.8 s touches latents 2 and 3.
    changed = (clip.latents.video != source.video).flatten(3).any(3).any(1)[0]
    assert changed.tolist() == [modality != "audio" and i in (2, 3) for i in range(5)]
    times = stages.audio_grid(pipeline.models, shape).positions()[0, 0]
    inside = (times[:, 1] > 0.5) & (times[:, 0] < 0.8)
    changed = (clip.latents.audio != source.audio).any(3).any(1)[0]
    assert torch.equal(changed, inside & (modality != "video"))


def test_a_retake_of_the_picture_keeps_the_sound_of_the_file(tiny_family, source_clip):
    pipeline = open_pipeline("retake", tiny_family)
    clip = pipeline(PROMPT, source=source_clip, end_time=0.5, modality="video")
    original = media.read_audio(source_clip).samples
    assert np.array_equal(clip.audio.samples, original[:, : clip.audio.samples.shape[1]])


def test_an_extension_keeps_the_beginning(tiny_family: Path, source_clip: Path):
    pipeline = open_pipeline("extend", tiny_family)
    clip = pipeline(PROMPT, source=source_clip, num_frames=25)
    with torch.inference_mode():
        source = encoding.encode_source(pipeline.models, clip.request, Progress())
    assert source.video.shape[2] == 5 and clip.latents.video.shape[2] == 7
    assert torch.equal(clip.latents.video[:, :, :5], source.video)
    kept = source.audio.shape[2]
    assert torch.equal(clip.latents.audio[:, :, :kept], source.audio)
    assert clip.latents.audio.shape[2] == round(25 / 12 * 25) > kept
    with pytest.raises(InputError, match="has 17 already, try 25"):
        pipeline(PROMPT, source=source_clip, num_frames=17)


@pytest.mark.parametrize("name", ["audio-to-video", "one-stage"])
def test_a_given_sound_comes_back_as_it_was(name, tiny_family, tmp_path, starts, make_tone):
    given = make_tone(2.0, 22050)
    media.write_audio(tmp_path / "tone.wav", given)
    clip = open_pipeline(name, tiny_family)(PROMPT, audio=tmp_path / "tone.wav")
    length = round(9 / 12 * 22050)
    assert clip.audio.sample_rate == 22050
    assert np.allclose(clip.audio.samples, given.samples[:, :length], atol=1e-4)  # 16 bits
    _, audio, _ = starts[0]
    assert not audio.denoise_mask.any()
    assert torch.equal(clip.latents.audio.transpose(1, 2).flatten(2), audio.clean_latent)


def test_a_short_sound_is_followed_by_silence(tiny_family: Path, tmp_path: Path, make_tone):
    media.write_audio(tmp_path / "tone.wav", make_tone(0.25))
    clip = open_pipeline("one-stage", tiny_family)(PROMPT, audio=tmp_path / "tone.wav")
    assert clip.audio.samples.shape == (2, 12000)
    assert np.abs(clip.audio.samples[:, :3900]).max() > 0.2
    assert not clip.audio.samples[:, 4000:].any()


def test_sound_alone_is_written_as_wav(tiny_family: Path, tmp_path: Path):
    clip = open_pipeline("text-to-audio", tiny_family)(PROMPT, num_frames=13)
    assert clip.latents.video is None
    path = clip.save(tmp_path / "sound.wav")
    audio = media.read_audio(path)
    assert audio.samples.shape == (2, round(13 / 12 * 16000))
    assert read_recipe(path)["pipeline"] == "text-to-audio"


def test_references_of_an_ic_lora_are_as_small_as_it_says(tiny_family, source_clip, starts):
    clip = open_pipeline("ic-lora", tiny_family)(PROMPT, controls=[("canny", source_clip)])
    assert clip.request.loras[0].path.name == "tiny-ic-lora-canny-control.safetensors"
    video, _, _ = starts[0]
    own, reference = 3 * 4 * 6, 3 * 2 * 3
    assert video.latent.shape[1] == own + reference
    assert starts[1][0].latent.shape[1] == 3 * 8 * 12  # the second stage has no reference
    assert float(video.positions[0, 1, -1, 1]) == 32  # its rows lie over the clip's


def test_the_sampler_the_schedule_and_the_interval_change_the_clip(tiny_family: Path):
    pipeline = open_pipeline("one-stage", tiny_family)
    base = pipeline(PROMPT).latents.video
    for settings in (
        {"sampler": "dpmpp-2m"},
        {"schedule": "linear-quadratic"},
        {"guidance_interval": (0.9, 1.0)},
        {"audio_prompt": "loud rain"},
    ):
        assert not torch.equal(pipeline(PROMPT, **settings).latents.video, base)
    split = pipeline(PROMPT, max_batch_size=1).latents.video
    assert torch.allclose(split, base, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("two-stages", {}, "tiny-spatial-upscaler-x2.safetensors is not in .*-upsampler-path"),
        ("distilled", {"skip_stage_2": True}, "not a distilled model: .*--distilled-lora"),
        ("two-stages", {"height": 40}, "height must be a multiple of 16; got 40"),
        ("keyframes", {"keyframes": [("PICTURE", 12)], "skip_stage_2": True}, "frame 12 is out"),
        ("ic-lora", {}, "ic-lora needs --control"),
        ("ic-lora", {"controls": [("depth", "SOURCE")]}, "tiny-ic-lora-depth-control"),
        ("ic-lora", {"controls": [("cany", "SOURCE")]}, "control must be one of .* try canny"),
        ("audio-to-video", {}, "audio-to-video needs --audio"),
        ("one-stage", {"audio": "PICTURE"}, "no sound track in this file"),
        ("one-stage", {"audio": "SOURCE", "audio_start_time": 9.0}, "after the end of"),
        ("one-stage", {"audio": "SOURCE", "generate_audio": False}, "exclude each other"),
        ("one-stage", {"source": "SOURCE"}, "does not use --source; try --pipeline retake"),
        ("one-stage", {"sampler": "euler-a"}, "sampler must be one of .* try euler"),
        ("retake", {}, "retake needs --source"),
        ("retake", {"source": "EMPTY"}, "empty.mp4: the file is empty"),
        ("retake", {"source": "BROKEN"}, "broken.mp4: not media that can be read"),
        ("retake", {"source": "SOURCE", "start_time": 2.0}, "after the end of the clip"),
        ("retake", {"source": "SOURCE", "start_time": 0.5, "end_time": 0.5}, "after start_time"),
        ("retake", {"source": "SOURCE", "end_time": 5.0}, "try 1.42"),
        ("retake", {"source": "SOURCE", "num_frames": 25}, "try 17, or --pipeline extend"),
        ("one-stage", {"loras": ["PICTURE"]}, "not a safetensors file"),
        ("one-stage", {"loras": ["absent.safetensors"]}, "absent.safetensors: no such file"),
        ("one-stage", {"loras": ["FOREIGN"]}, "it is for another model"),
        ("one-stage", {"loras": ["WIDER"]}, r"\[2, 32\] .* do not fit .* is for another model"),
        ("one-stage", {"camera": "jib"}, "camera must be one of .* try jib-up"),
        ("one-stage", {"camera": "static"}, "tiny-lora-camera-control-static.*not in .*--lora"),
        ("text-to-audio", {"camera": "static"}, "does not use --camera"),
        ("one-stage", {"loras": ["MODEL"]}, "a whole model, not a LoRA"),
        ("two-stages", {"spatial_upsampler": "WIDE"}, "latents of 16 channels"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    name, settings, message, tiny_model, picture, source_clip, tmp_path, monkeypatch,
    save_lora, save_upsampler,
):  # fmt: skip
    save_lora(tmp_path / "foreign.safetensors", layer="transformer_blocks.7.attn1.to_q")
    save_lora(tmp_path / "wider.safetensors", width=32)
    save_upsampler(tmp_path / "wide.safetensors", in_channels=16)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "broken.mp4").write_bytes(b"no video " * 100)
    files = {
        "PICTURE": picture, "SOURCE": source_clip, "EMPTY": tmp_path / "empty.mp4",
        "BROKEN": tmp_path / "broken.mp4", "FOREIGN": tmp_path / "foreign.safetensors",
        "MODEL": tiny_model, "WIDE": tmp_path / "wide.safetensors",
        "WIDER": tmp_path / "wider.safetensors",
    }  # fmt: skip

    def named(value):
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(named(item) for item in value)
        return files.get(value, value) if isinstance(value, str) else value

    monkeypatch.setattr(ModelSet, "_load", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(ModelSet, "_load_text_encoder", lambda *_: pytest.fail("weights were read"))
    pipeline = find_pipeline(name).from_model(str(tiny_model), device="cpu")
    with pytest.raises((InputError, CheckpointError), match=message) as refusal:
        pipeline(PROMPT, **named(settings))
    assert len(str(refusal.value).splitlines()) == 1


def test_a_lora_is_applied_at_its_strength(tiny_family: Path):
    pipeline = open_pipeline("one-stage", tiny_family)
    lora = tiny_family / "tiny-distilled-lora-2.safetensors"
    base, half, none = (
        pipeline(PROMPT, loras=[(lora, strength)]).latents.video for strength in (1.0, 0.5, 0.0)
    )
    assert torch.equal(none, pipeline(PROMPT).latents.video)
    assert not torch.equal(base, half) and not torch.equal(half, none)
    assert open_lora(lora).rank == 2


def test_a_camera_is_its_lora_beside_the_model_once(tiny_family: Path):
    pipeline = open_pipeline("one-stage", tiny_family)
    clip = pipeline(PROMPT, camera="jib-up")
    path = tiny_family / "tiny-lora-camera-control-jib-up.safetensors"
    assert [lora.path for lora in clip.request.loras] == [path]
    assert torch.equal(clip.latents.video, pipeline(PROMPT, loras=[path]).latents.video)
    again = pipeline.run(clip.request)  # as a replay does
    assert again.request == clip.request
    assert torch.equal(again.latents.video, clip.latents.video)


def test_a_ready_made_control_is_not_made_again(tiny_family, source_clip, tmp_path, monkeypatch):
    made = []
    original = ic_lora.make_control
    monkeypatch.setattr(
        ic_lora, "make_control", lambda *args: made.append(original(*args)) or made[-1]
    )
    pipeline = open_pipeline("ic-lora", tiny_family)
    edges = pipeline(PROMPT, controls=[("canny", source_clip)])
    assert len(made) == 1
    Image.fromarray(made[0][0]).save(tmp_path / "edges.png")
    ready = pipeline(PROMPT, controls=[("canny-made", tmp_path / "edges.png")])
    assert len(made) == 1  # taken as it is
    assert ready.request.loras == edges.request.loras
    first = pipeline(PROMPT, controls=[("canny", source_clip)], num_frames=1)
    ready = pipeline(PROMPT, controls=[("canny-made", tmp_path / "edges.png")], num_frames=1)
    assert torch.equal(first.latents.video, ready.latents.video)


def test_a_model_that_is_freed_between_stages_gives_the_same_clip(tiny_family: Path):
    kept, freed = (open_pipeline("two-stages", tiny_family) for _ in range(2))
    freed.models = replace(freed.models, keeps_loaded=False)
    assert torch.equal(kept(PROMPT).latents.video, freed(PROMPT).latents.video)
