"""Memory plans: a size in a preset's name is kept, and what autograd keeps is what is planned."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, TensorInfo
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoVAEConfig
from aiprod_trainer.memory_plan import (
    GIB,
    Tokens,
    check_plan,
    count_activations,
    kept_bytes,
    longest_sample,
    make_plan,
    plan_training,
)
from aiprod_trainer.training_config import LoraSection, read_training_config

ROOT = Path(__file__).parents[3]
PRESETS = sorted((ROOT / "configs/ltx-2").glob("*.yaml"))


@pytest.fixture(scope="module")
def headers() -> dict[str, Checkpoint]:
    """Key tables like those of the published files, from the sections that core's tests hold."""
    path = ROOT / "packages/aiprod-core/tests/test_published_names.py"
    spec = importlib.util.spec_from_file_location("published_names", path)
    assert spec is not None and spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    return {
        "19b": header(published.SECTION_19B, published.VAE_19B),
        "22b": header(published.SECTION_22B, published.VAE_22B),
    }


def header(section: dict, vae: dict) -> Checkpoint:
    with torch.device("meta"):
        networks = [
            (key_maps.TRANSFORMER, Transformer(TransformerConfig.from_metadata(section))),
            (key_maps.TEXT_PROJECTOR, TextProjector(TextConfig.from_metadata(section))),
            (key_maps.VIDEO_DECODER, VideoDecoder(VideoVAEConfig.from_metadata(vae))),
        ]
    tensors = {
        key_map.publish(name): TensorInfo(Path("x"), tuple(tensor.shape), torch.bfloat16)
        for key_map, network in networks
        for name, tensor in network.state_dict().items()
    }
    audio = AudioVAEConfig().to_metadata()
    config = {"transformer": section, "vae": vae, "audio_vae": audio}
    return Checkpoint((Path("x.safetensors"),), {"config": config}, tensors)


def test_there_is_a_preset_for_every_size():
    names = {path.stem for path in PRESETS}
    for kind in ("lora", "ic_lora"):
        assert {f"{kind}_{size}gb" for size in (12, 16, 24, 32, 48, 80)} <= names
    assert {"full_8x80gb", "lora_4x24gb"} <= names


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_the_card_in_its_name(path, headers):
    config = read_training_config(path)
    cards, _, size = path.stem.rpartition("_")[2].removesuffix("gb").rpartition("x")
    assert config.acceleration.memory_gb == float(size)
    assert config.acceleration.num_processes == int(cards or 1)
    for checkpoint in headers.values():
        tokens = longest_sample(config, checkpoint)
        assert make_plan(config, checkpoint, tokens).total <= float(size) * GIB


def test_a_plan_that_cannot_fit_is_refused_with_the_smallest_change_that_would(headers):
    preset = ROOT / "configs/ltx-2/lora_48gb.yaml"
    config = read_training_config(preset, ["acceleration.memory_gb=32"])
    tokens = longest_sample(config, headers["19b"])
    with pytest.raises(InputError, match=r"set acceleration.quantization int8\.") as refused:
        check_plan(config, headers["19b"], tokens)
    assert "GiB" in str(refused.value)
    mended = read_training_config(
        preset, ["acceleration.memory_gb=32", "acceleration.quantization=int8"]
    )
    assert "total" in check_plan(mended, headers["19b"], tokens)


def test_one_block_more_in_ram_is_never_asked_than_is_needed(headers):
    preset = ROOT / "configs/ltx-2/lora_32gb.yaml"
    config = read_training_config(preset, ["acceleration.memory_gb=22"])
    tokens = longest_sample(config, headers["22b"])
    with pytest.raises(InputError, match="blocks_to_swap") as refused:
        check_plan(config, headers["22b"], tokens)
    count = int(str(refused.value).split("blocks_to_swap ")[1].split(".")[0])

    def total(swapped: int) -> float:
        settings = [f"acceleration.blocks_to_swap={swapped}"]
        return make_plan(read_training_config(preset, settings), headers["22b"], tokens).total

    assert total(count) <= 22 * GIB < total(count - 1)


def test_full_fine_tuning_is_sent_to_several_cards(headers):
    config = read_training_config(
        ROOT / "configs/ltx-2/full_8x80gb.yaml",
        ["acceleration.distributed=ddp", "acceleration.num_processes=1"],
    )
    tokens = longest_sample(config, headers["19b"])
    with pytest.raises(InputError, match=r"acceleration\.distributed fsdp and .*num_processes"):
        check_plan(config, headers["19b"], tokens)


@pytest.mark.parametrize("lora", [None, LoraSection(rank=8, alpha=8)], ids=["full", "lora"])
def test_activations_counted_narrow_and_short_are_those_of_the_real_network(lora):
    config = TransformerConfig(
        num_attention_heads=8,
        attention_head_dim=32,
        audio_num_attention_heads=8,
        audio_attention_head_dim=16,
        in_channels=64,
        out_channels=64,
        audio_in_channels=64,
        audio_out_channels=64,
        num_layers=3,
        cross_attention_dim=256,
        audio_cross_attention_dim=128,
        apply_gated_attention=True,
        cross_attention_adaln=True,
    )
    tokens = Tokens(480, 60, 120)
    block, outside = count_activations(lora, False, config, tokens)
    one = kept_bytes(lora, False, replace(config, num_layers=1), tokens)
    three = kept_bytes(lora, False, config, tokens)
    assert block == pytest.approx((three - one) / 2, rel=0.1)
    assert block * 3 + outside == pytest.approx(three, rel=0.1)


def test_the_plan_of_a_data_set_is_for_its_largest_bucket(configure, make_part, tmp_path):
    make_part(tmp_path / "data/part-00000.safetensors")
    make_part(tmp_path / "data/part-00001.safetensors", video=torch.zeros(6, 8, 3, 5, 5), seed=1)
    config = configure(data={"preprocessed_data_root": str(tmp_path / "data")})
    assert "75 video, 18 audio, 16 text tokens" in plan_training(config)
