"""From a request to a clip with a tiny random model: what is kept, repeats, is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.types import AV
from aiprod_pipelines import encoding, media
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.recipe import latents_sha256, read_recipe
from aiprod_pipelines.request import GenerationRequest, PerModality
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

PROMPT = "a red ball bounces"


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> TI2VidOneStagePipeline:
    return TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    y, x = np.mgrid[:48, :72]
    pixels = np.stack([x * 3, y * 5, 255 - x * 2], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def same(a: AV, b: AV) -> bool:
    assert a.video is not None and b.video is not None
    assert a.audio is not None and b.audio is not None
    return torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio)


def test_one_seed_gives_one_clip_and_another_seed_another(pipeline):
    first, again = pipeline(PROMPT, seed=7), pipeline(PROMPT, seed=7)
    assert same(first.latents, again.latents)
    assert first.recipe["latents_sha256"] == again.recipe["latents_sha256"]
    assert not same(first.latents, pipeline(PROMPT, seed=8).latents)


def test_a_freshly_opened_model_repeats_the_clip_bit_for_bit(pipeline, tiny_model: Path):
    other = TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")
    assert same(pipeline(PROMPT, seed=3).latents, other(PROMPT, seed=3).latents)


def test_latents_have_the_shapes_that_the_grid_and_the_duration_give(pipeline):
    latents = pipeline(PROMPT, num_frames=13, height=40, width=64, frame_rate=10).latents
    assert latents.video.shape == (1, 8, 4, 5, 8)
    assert latents.audio.shape == (1, 2, round(13 / 10 * 25), 16)


def test_guidance_of_scale_1_equals_no_guidance_whatever_the_negative_prompt(pipeline):
    one = PerModality(1, 1)
    plain = pipeline(PROMPT, cfg_scale=one, negative_prompt="")
    other = pipeline(PROMPT, cfg_scale=one, negative_prompt="loud rain")
    assert same(plain.latents, other.latents)
    guided = pipeline(PROMPT, cfg_scale=PerModality(3, 3), negative_prompt="loud rain")
    assert not same(plain.latents, guided.latents)


def test_prompt_and_negative_prompt_both_matter_when_guided(pipeline):
    base = pipeline(PROMPT)
    assert not same(base.latents, pipeline("a blue ball on the floor").latents)
    assert not same(base.latents, pipeline(PROMPT, negative_prompt="grey").latents)


@pytest.mark.parametrize("name", ["stg_scale", "modality_scale"])
def test_other_guidance_terms_change_the_clip(pipeline, name: str):
    scale = PerModality(2.0, 2.0)
    assert not same(pipeline(PROMPT).latents, pipeline(PROMPT, **{name: scale}).latents)


def test_an_image_of_strength_1_is_the_first_latent_frame(pipeline, picture: Path):
    clip = pipeline(PROMPT, images=[picture])
    request = GenerationRequest(PROMPT, images=(picture,)).resolved(pipeline.models.profile)
    with torch.inference_mode():
        (image,) = encoding.encode_images(pipeline.models, request, request.images, Progress())
    assert torch.allclose(clip.latents.video[:, :, :1], image.latent, atol=1e-5)
    assert not torch.allclose(clip.latents.video[:, :, 1:2], image.latent, atol=1e-2)


def test_a_weaker_image_is_kept_less(pipeline, picture: Path):
    def distance(strength: float) -> float:
        clip = pipeline(PROMPT, images=[(picture, 0, strength)])
        exact = pipeline(PROMPT, images=[picture]).latents.video[:, :, :1]
        return float((clip.latents.video[:, :, :1] - exact).abs().mean())

    assert distance(1.0) < 1e-5 < distance(0.6) < distance(0.1)


def test_a_later_image_changes_the_clip_but_not_its_length(pipeline, picture: Path):
    clip = pipeline(PROMPT, images=[(picture, 8, 1.0)])
    assert clip.latents.video.shape == pipeline(PROMPT).latents.video.shape
    assert not same(clip.latents, pipeline(PROMPT).latents)


def test_a_silent_clip_has_no_sound(pipeline, tmp_path: Path):
    clip = pipeline(PROMPT, generate_audio=False)
    assert clip.latents.audio is None
    assert media.probe(clip.save(tmp_path / "silent.mp4")).audio_codec is None


def test_the_saved_file_has_the_size_rate_length_and_sound_that_were_asked_for(
    pipeline, tmp_path: Path
):
    clip = pipeline(PROMPT, enlarge=2)
    info = media.probe(clip.save(tmp_path / "clip.mp4"))
    assert (info.width, info.height, info.num_frames, info.fps) == (96, 64, 9, 12)
    assert info.audio_sample_rate == 16000
    assert clip.audio is not None
    assert clip.audio.samples.shape == (2, 12000)  # 9 frames at 12 a second, at 16 kHz
    assert set(clip.progress.seconds) == {
        "encode prompt", "denoise", "decode video", "decode audio"
    }  # fmt: skip


def test_the_file_carries_the_recipe_that_makes_it_again(pipeline, picture: Path, tmp_path: Path):
    clip = pipeline(PROMPT, seed=5, images=[(picture, 0, 0.5)])
    recipe = read_recipe(clip.save(tmp_path / "clip.mp4"))
    assert recipe == clip.recipe
    assert recipe["model"]["files"][0]["file"] == "tiny-dev.safetensors"
    assert list(recipe["inputs"]) == [str(picture)]
    again = pipeline.run(GenerationRequest.from_dict(recipe["request"]))
    assert again.recipe["latents_sha256"] == recipe["latents_sha256"]


def test_the_hash_sees_a_single_bit(pipeline):
    latents = pipeline(PROMPT).latents
    changed = latents.video.clone()
    changed[0, 0, 0, 0, 0] = torch.nextafter(changed[0, 0, 0, 0, 0], torch.tensor(1e9))
    assert latents_sha256({"video": latents.video}) != latents_sha256({"video": changed})
    assert latents_sha256({"video": changed}) != latents_sha256({"audio": changed})


def test_requests_are_refused_before_weights_are_read(tiny_model: Path, monkeypatch):
    models = ModelSet.open(str(tiny_model), device="cpu")
    monkeypatch.setattr(ModelSet, "_load", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(ModelSet, "_load_text_encoder", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="4k\\+1; got 10, try 9"):
        TI2VidOneStagePipeline(models)(PROMPT, num_frames=10)


def test_a_large_model_is_freed_stage_by_stage(tiny_model: Path):
    models = ModelSet.open(str(tiny_model), device="cpu")
    models.keeps_loaded = False
    clip = TI2VidOneStagePipeline(models)(PROMPT)
    assert isinstance(clip, Clip)
    assert models._loaded == {}


def test_a_folder_and_its_file_are_the_same_model(tiny_model: Path, pipeline):
    folder = TI2VidOneStagePipeline.from_model(str(tiny_model.parent), device="cpu")
    assert folder.models.checkpoint.tensors == open_checkpoint(tiny_model).tensors
    assert same(folder(PROMPT).latents, pipeline(PROMPT).latents)
