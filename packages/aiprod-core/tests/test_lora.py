"""LoRA files: what they cover, how they fuse, and that they come out again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.lora import Lora, coverage, fuse, open_lora
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.quantization.fp8 import cast_linears

Build = Callable[[TransformerConfig], Transformer]

LAYERS = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.audio_ff.net.0.proj",
    "patchify_proj",
    "adaln_single.linear",
)


@pytest.fixture
def write_lora(tmp_path: Path) -> Callable[..., Lora]:
    """Writes a LoRA of rank 2 for some layers of a transformer, under the published names."""

    def write(
        transformer: Transformer,
        layers: tuple[str, ...] = LAYERS,
        extra: dict[str, Tensor] | None = None,
        metadata: dict[str, str] | None = None,
        seed: int = 0,
    ) -> Lora:
        generator = torch.Generator().manual_seed(seed)
        tensors = dict(extra or {})
        for layer in layers:
            out_width, in_width = transformer.get_submodule(layer).weight.shape
            for name, shape in (("lora_A", (2, in_width)), ("lora_B", (out_width, 2))):
                matrix = torch.randn(shape, generator=generator).bfloat16()
                tensors[f"diffusion_model.{layer}.{name}.weight"] = matrix
        path = tmp_path / f"lora-{seed}.safetensors"
        save_file(tensors, path, metadata)
        return open_lora(path)

    return write


def delta(lora: Lora, layer: str) -> Tensor:
    down, up = (lora.checkpoint.read([key])[key].float() for key in lora.layers[layer].keys)
    return up @ down


def test_fusing_adds_strength_times_the_product(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    transformer = randomised(tiny_config)
    first, second = write_lora(transformer), write_lora(transformer, LAYERS[:1], seed=1)
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    fuse(transformer, [(first, 0.8), (second, -0.5)])
    for name, parameter in transformer.named_parameters():
        want, layer = before[name], name.removesuffix(".weight")
        if name.endswith(".weight") and layer in first.layers:
            want = want + 0.8 * delta(first, layer)
            if layer in second.layers:
                want = want - 0.5 * delta(second, layer)
        torch.testing.assert_close(parameter.data, want.data)


def test_unfusing_restores_every_bit(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    for dtype in (torch.float32, torch.bfloat16):
        transformer = randomised(tiny_config).to(dtype)
        before = {name: p.clone() for name, p in transformer.named_parameters()}
        lora = write_lora(transformer)
        fusion = fuse(transformer, [(lora, 0.7)])
        again = fuse(transformer, [(lora, 0.3)])
        assert not torch.equal(transformer.patchify_proj.weight, before["patchify_proj.weight"])
        again.unfuse()
        fusion.unfuse()
        assert all(torch.equal(p, before[name]) for name, p in transformer.named_parameters())


def test_the_sum_is_rounded_once_and_only_where_something_was_added(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    transformer = randomised(tiny_config)
    lora = write_lora(transformer)
    exact = transformer.patchify_proj.weight + delta(lora, "patchify_proj")
    untouched = transformer.proj_out.weight.clone()
    fuse(transformer, [(lora, 1.0)], round_to=torch.bfloat16)
    weight = transformer.patchify_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, exact.bfloat16().float())
    assert torch.equal(transformer.proj_out.weight, untouched)


def test_strength_zero_leaves_the_weights_alone(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    transformer = randomised(tiny_config)
    before = transformer.patchify_proj.weight.clone()
    fusion = fuse(transformer, [(write_lora(transformer), 0.0)], round_to=torch.bfloat16)
    assert not fusion.originals
    assert torch.equal(transformer.patchify_proj.weight, before)


def test_layers_the_model_lacks_are_named_and_refused_unless_allowed(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    deep = randomised(replace(tiny_config, num_layers=4))
    shallow = randomised(tiny_config)
    strange = "transformer_blocks.3.attn1.to_q"
    lora = write_lora(deep, (*LAYERS, strange))
    assert coverage(shallow, lora).unmatched == (strange,)
    assert set(coverage(shallow, lora).matched) == set(LAYERS)
    with pytest.raises(InputError, match=f"1 of 5 layers.*{strange}"):
        fuse(shallow, [(lora, 1.0)])
    assert set(fuse(shallow, [(lora, 1.0)], allow_unmatched=True).originals) == set(LAYERS)


def test_a_lora_that_matches_nothing_is_refused_even_when_allowed(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    deep = randomised(replace(tiny_config, num_layers=4))
    lora = write_lora(deep, ("transformer_blocks.3.attn1.to_q",))
    with pytest.raises(InputError, match="another model"):
        fuse(randomised(tiny_config), [(lora, 1.0)], allow_unmatched=True)


def test_matrices_of_another_width_are_refused_before_anything_changes(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    other = randomised(replace(tiny_config, out_channels=10))
    transformer = randomised(tiny_config)
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    with pytest.raises(CheckpointError, match=r"proj_out.*another model"):
        fuse(transformer, [(write_lora(other, ("patchify_proj", "proj_out")), 1.0)])
    assert all(torch.equal(p, before[name]) for name, p in transformer.named_parameters())


def test_reference_factors_come_from_the_metadata(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    transformer = randomised(tiny_config)
    plain = write_lora(transformer)
    assert (plain.reference_downscale_factor, plain.reference_temporal_scale_factor) == (1, 1)
    metadata = {"reference_downscale_factor": "2", "reference_temporal_scale_factor": "4"}
    control = write_lora(transformer, metadata=metadata)
    assert (control.reference_downscale_factor, control.reference_temporal_scale_factor) == (2, 4)
    with pytest.raises(CheckpointError, match="reference_downscale_factor is 0"):
        write_lora(transformer, metadata={"reference_downscale_factor": "0"})


def test_files_without_whole_pairs_are_refused(
    tiny_config: TransformerConfig,
    randomised: Build,
    write_lora: Callable[..., Lora],
    tmp_path: Path,
):
    single = {"diffusion_model.proj_out.lora_A.weight": torch.zeros(2, 4)}
    with pytest.raises(CheckpointError, match=r"proj_out\.lora_B"):
        write_lora(randomised(tiny_config), extra=single)
    save_file({"blocks.0.weight": torch.zeros(2)}, tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.weight"):
        open_lora(tmp_path / "base.safetensors")


def test_fp8_weights_take_a_lora_and_give_it_back(
    tiny_config: TransformerConfig, randomised: Build, write_lora: Callable[..., Lora]
):
    transformer = randomised(tiny_config)
    lora = write_lora(transformer, LAYERS[:2])
    cast_linears(transformer)
    before = {name: p.float() for name, p in transformer.named_parameters()}
    fusion = fuse(transformer, [(lora, 0.5)])
    for layer in LAYERS[:2]:
        weight = transformer.get_parameter(f"{layer}.weight")
        assert weight.dtype == torch.float8_e4m3fn
        want = before[f"{layer}.weight"] + 0.5 * delta(lora, layer)
        torch.testing.assert_close(weight.float(), want, atol=2**-9, rtol=2**-4)
    fusion.unfuse()
    assert all(torch.equal(p.float(), before[n]) for n, p in transformer.named_parameters())
