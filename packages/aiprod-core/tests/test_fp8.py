"""8-bit weights: what is cast, how it rounds, and how quantised files load."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from aiprod_core.errors import CheckpointError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import open_checkpoint, save_checkpoint
from aiprod_core.loader.lora import fuse, open_lora, put_fused
from aiprod_core.loader.networks import load_transformer
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.quantization.fp8 import (
    FP8,
    Fp8CastLinear,
    Fp8ScaledLinear,
    cast_linears,
    is_cast_target,
    round_stochastically,
    scaled_matmul,
    to_fp8,
    weight_scale_of,
)
from aiprod_core.types import Modality

Build = Callable[[TransformerConfig], Transformer]
Inputs = Callable[..., tuple[Modality, Modality]]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def save_quantised(
    path: Path, transformer: Transformer, *, input_scale: float | None = None
) -> dict[str, torch.Tensor]:
    """Writes the blocks' linears as fp8 with a scale each; returns what they stand for."""
    tensors, dequantised = {}, {}
    for name, tensor in transformer.state_dict().items():
        key = f"model.diffusion_model.{name}"
        if name.endswith(".weight") and is_cast_target(name.removesuffix(".weight")):
            scale = weight_scale_of(tensor)
            tensors[key] = to_fp8(tensor / scale)
            tensors[f"{key}_scale"] = scale
            if input_scale is not None:
                input_key = key.removesuffix("weight") + "input_scale"
                tensors[input_key] = torch.tensor(input_scale)
            dequantised[name] = tensors[key].float() * scale
        else:
            tensors[key] = tensor
    save_file(
        tensors, path, {"config": json.dumps({"transformer": transformer.config.to_metadata()})}
    )
    return dequantised


def test_casting_covers_the_large_linears_of_the_blocks_and_nothing_else(
    tiny_config: TransformerConfig, randomised: Build
):
    transformer = randomised(tiny_config)
    linears = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    cast_linears(transformer)
    cast = {n for n, m in transformer.named_modules() if isinstance(m, Fp8CastLinear)}
    assert len(cast) == tiny_config.num_layers * (6 * 4 + 2 * 2)
    kept = linears - cast
    assert not any(n.endswith(("to_q", "to_out.0", "net.2")) for n in kept)
    assert {"patchify_proj", "proj_out", "adaln_single.linear"} <= kept
    assert all("to_gate_logits" in n for n in kept if n.startswith("transformer_blocks."))
    state = transformer.state_dict()
    assert all(state[f"{n}.{leaf}"].dtype == FP8 for n in cast for leaf in ("weight", "bias"))


def test_a_cast_linear_computes_in_the_activations_type():
    linear = nn.Linear(8, 6)
    cast = Fp8CastLinear(linear.weight, linear.bias)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 8, dtype=dtype)
        want = nn.functional.linear(
            x, to_fp8(linear.weight).to(dtype), to_fp8(linear.bias).to(dtype)
        )
        assert torch.equal(cast(x), want)


def test_a_cast_network_stays_close_to_the_original(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    exact = transformer(video, audio)
    cast_linears(transformer)
    for got, want in zip(transformer(video, audio), exact, strict=True):
        assert 0 < (got - want).norm() / want.norm() < 0.2


def test_a_quantised_file_loads_with_its_scales_folded_in(
    tiny_config: TransformerConfig, randomised: Build, tmp_path: Path
):
    path = tmp_path / "fp8.safetensors"
    dequantised = save_quantised(path, randomised(tiny_config))
    loaded = load_transformer(open_checkpoint(path), dtype=torch.float32)
    assert not any("scale" in name.split(".")[-1] for name, _ in loaded.named_buffers())
    for name, value in dequantised.items():
        assert torch.equal(loaded.get_parameter(name).float(), to_fp8(value.bfloat16()).float())
    assert loaded.patchify_proj.weight.dtype == torch.float32


def test_a_cast_file_without_scales_loads_as_it_was_saved(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs, tmp_path: Path
):
    transformer = randomised(tiny_config)
    cast_linears(transformer)
    path = tmp_path / "cast.safetensors"
    metadata = {"config": {"transformer": tiny_config.to_metadata()}}
    save_checkpoint(path, [(key_maps.TRANSFORMER, transformer)], metadata)
    loaded = load_transformer(open_checkpoint(path))
    inputs = modalities(tiny_config)
    assert all(map(torch.equal, loaded(*inputs), transformer(*inputs)))


def test_a_file_with_input_scales_multiplies_in_fp8(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs, tmp_path: Path
):
    config = replace(tiny_config, num_layers=1)
    transformer = randomised(config)
    path = tmp_path / "scaled.safetensors"
    save_quantised(path, transformer, input_scale=0.02)
    loaded = load_transformer(open_checkpoint(path), dtype=torch.float32)
    layer = loaded.get_submodule("transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, Fp8ScaledLinear)
    x = torch.randn(2, 5, config.width)
    x_seen = to_fp8(x / 0.02).float() * 0.02
    want = nn.functional.linear(x_seen, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), want)
    inputs = modalities(config)
    for got, exact in zip(loaded(*inputs), transformer(*inputs), strict=True):
        assert (got - exact).norm() / exact.norm() < 0.3


def test_a_lora_that_was_added_to_such_a_file_is_put_into_one_whose_weights_were_left(
    tiny_config: TransformerConfig, randomised: Build, tmp_path: Path
):
    path = tmp_path / "scaled.safetensors"
    save_quantised(path, randomised(replace(tiny_config, num_layers=1)), input_scale=0.02)
    layer = "transformer_blocks.0.attn1.to_q"
    added = load_transformer(open_checkpoint(path), dtype=torch.float32)
    rows, columns = added.get_submodule(layer).weight.shape
    lora = {f"{layer}.lora_A.weight": torch.randn(2, columns)}
    lora[f"{layer}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(lora, tmp_path / "lora.safetensors")
    fusion = fuse(added, [(open_lora(tmp_path / "lora.safetensors"), 0.5)])
    save_file(fusion.fused(), tmp_path / "fused.safetensors")
    fused = load_file(tmp_path / "fused.safetensors")
    assert f"{layer}.input_scale" in fused
    put = load_transformer(open_checkpoint(path), dtype=torch.float32, left=fused)
    assert put.get_submodule(layer).weight.is_meta
    put_fused(put, fused, keep_originals_on="meta")
    for (name, one), other in zip(
        put.state_dict().items(), added.state_dict().values(), strict=True
    ):
        assert torch.equal(one.float(), other.float()), name


def test_inputs_beyond_the_range_are_clamped_not_lost():
    linear = nn.Linear(4, 4, bias=False)
    scaled = Fp8ScaledLinear(to_fp8(linear.weight), None, torch.tensor(1.0), torch.tensor(1e-3))
    assert scaled(torch.full((1, 4), 1e6)).isfinite().all()
    assert to_fp8(torch.tensor([1e4, -1e4])).float().tolist() == [448.0, -448.0]


def test_the_reference_product_agrees_with_pytorchs_kernel():
    x, weight = to_fp8(torch.randn(16, 32) * 50), to_fp8(torch.randn(16, 32) * 50)
    scales = torch.tensor(0.02), torch.tensor(0.003)
    got = scaled_matmul(x, weight, *scales)
    kernel = torch.ops.aten._scaled_mm(
        x, weight.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.float32
    )
    torch.testing.assert_close(got, kernel, atol=1e-4, rtol=1e-4)


def test_a_new_weight_gets_a_new_scale():
    linear = nn.Linear(8, 8)
    scale = weight_scale_of(linear.weight)
    scaled = Fp8ScaledLinear(to_fp8(linear.weight / scale), linear.bias, scale, torch.tensor(1.0))
    scaled.set_dense_weight(linear.weight * 100)
    torch.testing.assert_close(scaled.dense_weight(), linear.weight * 100, atol=0.1, rtol=0.07)


def test_random_rounding_is_right_on_average_also_for_the_smallest_numbers():
    generator = torch.Generator().manual_seed(0)
    for value in (0.3, -1.7, 0.004, 3e-4, 447.0):
        rounded = round_stochastically(torch.full((20000,), value), generator).float()
        lower, upper = rounded.min(), rounded.max()
        assert len(rounded.unique()) == 2 and lower <= value <= upper
        assert abs(rounded.mean() - value) < 0.02 * (upper - lower)
    exact = torch.arange(-448.0, 449.0, 32)
    assert torch.equal(round_stochastically(exact, generator).float(), to_fp8(exact).float())


def test_scales_by_channel_are_refused(
    tiny_config: TransformerConfig, randomised: Build, tmp_path: Path
):
    path = tmp_path / "fp8.safetensors"
    save_quantised(path, randomised(tiny_config))
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.read(checkpoint.tensors)
    key = next(key for key in tensors if key.endswith("weight_scale"))
    tensors[key] = torch.ones(32)
    save_file(tensors, tmp_path / "channels.safetensors", {"config": json.dumps(checkpoint.config)})
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \[32\]"):
        load_transformer(open_checkpoint(tmp_path / "channels.safetensors"))
