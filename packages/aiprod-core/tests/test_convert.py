"""Converted files: the same model as quantising and fusing at load time, written piece by piece."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from aiprod_core.loader.convert import convert
from aiprod_core.loader.lora import fuse, open_lora
from aiprod_core.loader.networks import load_transformer
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.quantization.fp8 import FP8

Build = Callable[[TransformerConfig], Transformer]


@pytest.fixture
def model(tmp_path: Path, tiny_config: TransformerConfig, randomised: Build) -> Checkpoint:
    path = tmp_path / "tiny-dev.safetensors"
    metadata = {"config": {"transformer": tiny_config.to_metadata()}, "model_version": "2.3.0"}
    save_checkpoint(path, [(key_maps.TRANSFORMER, randomised(tiny_config))], metadata)
    return open_checkpoint(path)


@pytest.fixture
def lora(tmp_path: Path, model: Checkpoint) -> Path:
    generator = torch.Generator().manual_seed(0)
    name = "transformer_blocks.1.attn1.to_q"
    out, width = model.tensors[f"model.diffusion_model.{name}.weight"].shape
    path = tmp_path / "tiny-lora.safetensors"
    matrices = {
        f"diffusion_model.{name}.lora_A.weight": torch.randn(2, width, generator=generator),
        f"diffusion_model.{name}.lora_B.weight": torch.randn(out, 2, generator=generator),
    }
    save_file(matrices, path)
    return path


def test_a_copy_holds_the_same_tensors_and_metadata(tmp_path: Path, model: Checkpoint):
    convert(model, tmp_path / "copy.safetensors")
    original, copy = load_file(model.paths[0]), load_file(tmp_path / "copy.safetensors")
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[key], copy[key]) for key in original)
    assert open_checkpoint(tmp_path / "copy.safetensors").metadata == model.metadata


def test_an_fp8_file_loads_as_what_quantising_at_load_time_gives(tmp_path: Path, model: Checkpoint):
    convert(model, tmp_path / "tiny-dev-fp8.safetensors", to_fp8_weights=True)
    converted = load_transformer(open_checkpoint(tmp_path / "tiny-dev-fp8.safetensors"))
    quantised = load_transformer(model, quantization="fp8")
    expected = quantised.state_dict()
    assert any(tensor.dtype == FP8 for tensor in expected.values())
    for name, tensor in converted.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.float(), expected[name].float())


def test_an_added_lora_is_the_same_as_one_fused_at_load_time(
    tmp_path: Path, model: Checkpoint, lora: Path
):
    adapters = [(open_lora(lora), 0.5)]
    path = tmp_path / "tiny-distilled.safetensors"
    convert(model, path, adapters=adapters, metadata={"distilled": True})
    fused = load_transformer(model)
    fuse(fused, adapters)
    converted = open_checkpoint(path)
    for name, tensor in load_transformer(converted).state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name])
    assert converted.metadata["distilled"] is True


def test_a_conversion_that_stops_leaves_nothing(
    tmp_path: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    fetch = Checkpoint.fetch
    count = iter(range(1000))

    def failing(self: Checkpoint, key: str) -> torch.Tensor:
        if next(count) == 5:
            raise KeyboardInterrupt
        return fetch(self, key)

    monkeypatch.setattr(Checkpoint, "fetch", failing)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "copy.safetensors")
    assert set(tmp_path.iterdir()) == before


def test_fp8_is_not_converted_again(tmp_path: Path, model: Checkpoint):
    path = tmp_path / "tiny-dev-fp8.safetensors"
    convert(model, path, to_fp8_weights=True)
    with pytest.raises(InputError, match="already"):
        convert(open_checkpoint(path), tmp_path / "again.safetensors")
