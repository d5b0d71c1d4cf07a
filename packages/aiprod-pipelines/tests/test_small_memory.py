"""Where weights wait changes nothing but memory; quantising is written down; runs get smaller."""

from pathlib import Path

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_pipelines import decoding
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.conversion import convert_variants
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.replay import open_replay
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

PROMPT = "a red ball bounces"


def made(model: Path, **options: object):
    pipeline = TI2VidOneStagePipeline.from_model(str(model), **options)
    return pipeline(PROMPT, num_inference_steps=2)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> str:
    return made(tiny_model).recipe["latents_sha256"]


@pytest.mark.parametrize("offload", ["model", "block", "disk", "cpu"])
def test_offload_gives_the_same_bits(offload: str, tiny_model: Path, plain: str):
    assert made(tiny_model, offload=offload).recipe["latents_sha256"] == plain


def test_networks_are_freed_after_their_stage_on_a_cpu(tiny_model: Path):
    kept = made(tiny_model).models
    assert "transformer" in kept._loaded
    freed = made(tiny_model, offload="model").models
    assert freed._loaded == {}


def test_a_lora_cannot_be_added_to_weights_in_the_file(tiny_model: Path, tmp_path: Path, save_lora):
    lora = tmp_path / "lora.safetensors"
    save_lora(lora)
    pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model), offload="disk")
    with pytest.raises(InputError, match="models convert"):
        pipeline(PROMPT, loras=[lora])


def test_a_quantised_clip_says_so_and_is_replayed_so(tiny_model: Path, tmp_path: Path, plain: str):
    clip = made(tiny_model, quantization="int8")
    assert clip.recipe["latents_sha256"] != plain
    again = open_replay(clip.save(tmp_path / "clip.mp4"))
    assert again.pipeline.models.quantization == "int8"
    assert again.is_same(again.run())


def test_a_lora_on_quantised_weights_is_taken_out_again(
    tiny_model: Path, tmp_path: Path, save_lora
):
    lora = tmp_path / "lora.safetensors"
    save_lora(lora)
    pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model), quantization="int8")
    settings = {"num_inference_steps": 2}
    before = pipeline(PROMPT, **settings).recipe["latents_sha256"]
    changed = pipeline(PROMPT, loras=[lora], **settings).recipe["latents_sha256"]
    assert changed != before
    assert pipeline(PROMPT, **settings).recipe["latents_sha256"] == before


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [("offload", "gpu", "disk"), ("quantization", "fp4", "int8"), ("max_memory", "lots", "12GiB")],
)
def test_unknown_ways_are_refused_with_the_known(
    option: str, value: str, hint: str, tiny_model: Path
):
    with pytest.raises(InputError, match=hint):
        ModelSet.open(tiny_model, **{option: value})


def test_max_memory_bounds_what_is_free(tiny_model: Path):
    assert ModelSet.open(tiny_model, max_memory=1).free_memory() == 0
    assert ModelSet.open(tiny_model, max_memory="4GiB").free_memory() < 4 * 2**30


def test_a_step_cache_is_part_of_the_recipe_and_replays(tiny_model: Path, tmp_path: Path):
    pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model))
    clip = pipeline(PROMPT, num_inference_steps=12, step_cache="fast")
    assert clip.recipe["request"]["step_cache"] == "fast"
    again = open_replay(clip.save(tmp_path / "clip.mp4"))
    assert again.is_same(again.run())


def test_decoding_goes_on_in_smaller_tiles_where_memory_runs_out(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    models = ModelSet.open(tiny_model)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 8, 40, 4, 6, generator=generator)
    expected = torch.cat(list(decoding.decode_video(models, latent, Progress())))
    decode_chunks = decoding.decode_chunks
    tilings = []

    def failing(decoder, latent, tiling, **options):
        chunks = decode_chunks(decoder, latent, tiling, **options)
        tilings.append(tiling)
        yield next(chunks)
        if len(tilings) == 1:
            raise RuntimeError("CUDA out of memory")
        yield from chunks

    monkeypatch.setattr(decoding, "decode_chunks", failing)
    monkeypatch.setattr(ModelSet, "free_memory", lambda self: 10_000_000)
    found = torch.cat(list(decoding.decode_video(models, latent, Progress())))
    assert len(tilings) == 2
    assert tilings[0] != tilings[1]
    assert found.shape == expected.shape


@pytest.mark.parametrize("variant", ["dev-fp8", "distilled", "distilled-fp8"])
def test_a_converted_variant_runs(variant: str, tiny_family: Path, tmp_path: Path):
    (path,) = convert_variants(str(tiny_family / "tiny-dev.safetensors"), tmp_path, [variant])
    assert path.name == f"tiny-{variant}.safetensors"
    assert open_checkpoint(path).is_fp8 == variant.endswith("fp8")
    clip = made(path)
    assert clip.latents.video is not None
    assert clip.latents.video.isfinite().all()


def test_converting_refuses_before_it_writes(tiny_family: Path, tmp_path: Path):
    model = str(tiny_family / "tiny-dev.safetensors")
    with pytest.raises(InputError, match="dev-fp8"):
        convert_variants(model, tmp_path / "new", ["dev-fp8", "dev-fp4"])
    (tmp_path / "tiny-dev-fp8.safetensors").write_text("mine")
    with pytest.raises(InputError, match="already"):
        convert_variants(model, tmp_path, ["dev-fp8"])
    assert not (tmp_path / "new").exists()
