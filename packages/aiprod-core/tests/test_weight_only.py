"""Integer weights and quantisation while loading: how near they stay, what is never in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import load_transformer
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.quantization.fp8 import (
    FP8,
    Fp8CastLinear,
    Fp8ScaledLinear,
    cast_linears,
    is_cast_target,
)
from aiprod_core.quantization.schemes import SCHEMES, check_scheme
from aiprod_core.quantization.weight_only import Int4Linear, Int8Linear
from aiprod_core.types import Modality

Build = Callable[[TransformerConfig], Transformer]
Inputs = Callable[..., tuple[Modality, Modality]]


@pytest.fixture
def saved(tmp_path: Path, tiny_config: TransformerConfig, randomised: Build) -> Checkpoint:
    path = tmp_path / "tiny.safetensors"
    modules = [(key_maps.TRANSFORMER, randomised(tiny_config))]
    save_checkpoint(path, modules, {"config": {"transformer": tiny_config.to_metadata()}})
    return open_checkpoint(path)


@pytest.mark.parametrize(("kind", "levels"), [(Int8Linear, 254), (Int4Linear, 15)])
def test_a_weight_is_off_by_at_most_half_a_level(kind: type, levels: int):
    torch.manual_seed(0)
    weight = torch.randn(6, 128)
    error = (kind(weight, None).dense_weight() - weight).abs()
    row_range = weight.amax(1) - weight.amin(1)
    widest = torch.maximum(row_range, 2 * weight.abs().amax(1))
    assert (error.amax(1) <= widest / levels / 2 * 1.001).all()


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_the_product_is_that_of_the_dense_weight(kind: type):
    torch.manual_seed(0)
    linear = kind(torch.randn(6, 32), torch.randn(6))
    x = torch.randn(2, 5, 32)
    expected = nn.functional.linear(x, linear.dense_weight(), linear.bias)
    torch.testing.assert_close(linear(x), expected)
    assert linear(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_random_rounding_is_right_on_average(kind: type):
    torch.manual_seed(0)
    weight = torch.randn(2, 16)
    linear, generator = kind(weight, None), torch.Generator().manual_seed(0)
    total = torch.zeros_like(weight)
    for _ in range(400):
        linear.set_dense_weight(weight, generator)
        total += linear.dense_weight()
    step = weight.abs().max() * 2 / (254 if kind is Int8Linear else 15)
    assert (total / 400 - weight).abs().max() < step / 8


def test_int4_takes_a_byte_for_two_columns():
    linear = Int4Linear(torch.randn(8, 64), None)
    assert linear.weight.shape == (8, 32)
    assert (linear.out_features, linear.in_features) == (8, 64)


def test_dynamic_scaling_survives_inputs_beyond_the_range_of_fp8():
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), torch.randn(4, 32) * 1e4
    out = Fp8ScaledLinear.quantized(weight, None)(x)
    expected = x @ weight.T
    assert (out - expected).norm() / expected.norm() < 0.06


@pytest.mark.parametrize(
    ("scheme", "kind", "tolerance"),
    [
        ("fp8", Fp8CastLinear, 0.15),
        ("fp8-scaled-mm", Fp8ScaledLinear, 0.2),
        ("int8", Int8Linear, 0.03),
        ("int4", Int4Linear, 0.4),
    ],
)
def test_a_transformer_is_quantised_while_it_is_loaded(
    scheme: str, kind: type, tolerance: float, saved: Checkpoint, modalities: Inputs
):
    dense = load_transformer(saved)
    loaded = load_transformer(saved, quantization=scheme)
    quantised = {name for name, module in loaded.named_modules() if isinstance(module, kind)}
    linears = {name for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    assert quantised == {name for name in linears if is_cast_target(name)}
    inputs = modalities(dense.config)
    for expected, found in zip(dense(*inputs), loaded(*inputs), strict=True):
        assert (found - expected).norm() / expected.norm() < tolerance


def test_quantising_reads_one_weight_at_a_time(saved: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    read = Checkpoint.read
    mapped: set[str] = set()

    def spy(self: Checkpoint, keys: object, device: str = "cpu") -> dict[str, torch.Tensor]:
        tensors = read(self, keys, device)
        mapped.update(tensors)
        return tensors

    monkeypatch.setattr(Checkpoint, "read", spy)
    load_transformer(saved, quantization="int8")
    assert mapped == set()


def test_an_fp8_file_is_not_quantised_again(
    tmp_path: Path, tiny_config: TransformerConfig, randomised: Build
):
    transformer = randomised(tiny_config)
    cast_linears(transformer)
    path = tmp_path / "tiny-fp8.safetensors"
    modules = [(key_maps.TRANSFORMER, transformer)]
    save_checkpoint(path, modules, {"config": {"transformer": tiny_config.to_metadata()}})
    with pytest.raises(InputError, match="quantised already"):
        load_transformer(open_checkpoint(path), quantization="int8")


def test_loading_in_another_precision_gives_what_casting_gives(saved: Checkpoint):
    loaded = load_transformer(saved, dtype=torch.bfloat16)
    expected = load_transformer(saved).bfloat16()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_weights_of_every_scheme_are_smaller_than_bfloat16(scheme: str):
    linear = SCHEMES[scheme](torch.randn(64, 64), None)
    stored = sum(t.nbytes for t in (linear.weight, *linear.buffers()))
    assert stored < 64 * 64 * 2 * 0.6
    if scheme == "fp8":
        assert linear.weight.dtype == FP8


def test_an_unknown_scheme_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="int4"):
        check_scheme("fp4")
    assert check_scheme("fp8-cast") == "fp8"
