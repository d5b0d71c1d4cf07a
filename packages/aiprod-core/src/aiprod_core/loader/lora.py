"""LoRA files (arXiv:2106.09685): read, checked against a network, fused and taken out again.

Fusing adds `strength * B A` to the weights, so that inference costs nothing extra. LTX-2's files
have no alpha: the product is added as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint
from aiprod_core.quantization.fp8 import Fp8CastLinear, Fp8ScaledLinear

# LTX-2's published naming: diffusion_model.LAYER.lora_A.weight (rank, in), lora_B (out, rank).
PREFIX = "diffusion_model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class Factors(NamedTuple):
    """The two matrices' keys in the file."""

    down: str
    up: str


@dataclass(frozen=True)
class Lora:
    """An opened file: `layers` maps the network's layer names to keys; nothing is read yet.

    The factors say at which fraction of the clip's resolution and frame rate an IC-LoRA expects its
    reference video; 1 for other LoRAs.
    """

    checkpoint: Checkpoint
    layers: dict[str, Factors]
    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(self.checkpoint.tensors[keys.down].shape[0] for keys in self.layers.values())


class Coverage(NamedTuple):
    """Layer names of a LoRA that a network has, and those that it lacks."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]


def open_lora(path: str | Path) -> Lora:
    """Reads the header. Raises CheckpointError when it holds no LoRA, or half of one."""
    checkpoint = open_checkpoint(path)
    layers = published_layers(checkpoint)
    if not layers:
        some = ", ".join(list(checkpoint.tensors)[:3])
        raise CheckpointError(
            f"{path}: no LoRA matrices named {PREFIX}LAYER{DOWN}; it holds {some or 'nothing'}"
        )
    return Lora(
        checkpoint,
        layers,
        _positive_integer(checkpoint, "reference_downscale_factor"),
        _positive_integer(checkpoint, "reference_temporal_scale_factor"),
    )


def published_layers(checkpoint: Checkpoint) -> dict[str, Factors]:
    """The layers of a file in LTX-2's own naming."""
    layers: dict[str, Factors] = {}
    for key in checkpoint.tensors:
        for suffix, other in ((DOWN, UP), (UP, DOWN)):
            if not key.endswith(suffix):
                continue
            stem = key.removesuffix(suffix)
            if stem + other not in checkpoint.tensors:
                raise CheckpointError(
                    f"{checkpoint.paths[0]}: {key} has no {stem + other} beside it. "
                    "The file is incomplete; fetch it again."
                )
            layers[stem.removeprefix(PREFIX)] = Factors(stem + DOWN, stem + UP)
    return layers


def coverage(module: nn.Module, lora: Lora) -> Coverage:
    """Which of the LoRA's layers are linear layers of `module`."""
    linears = _linears(module)
    matched = tuple(name for name in lora.layers if name in linears)
    return Coverage(matched, tuple(name for name in lora.layers if name not in linears))


@dataclass
class Fusion:
    """What `fuse` replaced. Take several out in the reverse of the order they were put in."""

    module: nn.Module
    originals: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Puts the base weights back, bit for bit."""
        for name, (weight, scale) in self.originals.items():
            linear = self.module.get_submodule(name)
            parameter = linear.get_parameter("weight")
            parameter.data = weight.to(parameter.device)
            if isinstance(linear, Fp8ScaledLinear) and scale is not None:
                linear.weight_scale = scale
        self.originals.clear()


@torch.no_grad()
def fuse(
    module: nn.Module,
    adapters: Sequence[tuple[Lora, float]],
    *,
    allow_unmatched: bool = False,
    round_to: torch.dtype | None = None,
    keep_originals_on: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Fusion:
    """Adds `sum(strength * B A)` to the weights of `module`, in place.

    The sum is computed in float32 and rounded once, to the weight's own type, and before that to
    `round_to` where given (published pipelines round to bfloat16 even on float32 weights). fp8
    weights are rounded at random where a generator is given. The originals stay where they are, or
    move to `keep_originals_on`. Adapters with strength 0 are left out.

    Raises InputError when layers of an adapter are not in the module, unless `allow_unmatched` and
    some are; CheckpointError when matrices do not fit their layer.
    """
    active = [(lora, strength) for lora, strength in adapters if strength != 0]
    for lora, _ in active:
        _check_coverage(lora, coverage(module, lora), allow_unmatched)
        _check_shapes(lora, module)
    linears = _linears(module)
    factors = [
        lora.checkpoint.read(key for keys in lora.layers.values() for key in keys)
        for lora, _ in active
    ]
    fusion = Fusion(module)
    for name, linear in linears.items():
        deltas = [
            (matrices[lora.layers[name].down], matrices[lora.layers[name].up], strength)
            for (lora, strength), matrices in zip(active, factors, strict=True)
            if name in lora.layers
        ]
        if not deltas:
            continue
        is_fp8 = isinstance(linear, Fp8CastLinear | Fp8ScaledLinear)
        dense = (linear.dense_weight() if is_fp8 else linear.weight).float()
        for down, up, strength in deltas:
            product = up.to(dense.device).float() @ down.to(dense.device).float()
            dense = dense + strength * product
        if round_to is not None:
            dense = dense.to(round_to)
        weight = linear.weight.data
        scale = linear.weight_scale if isinstance(linear, Fp8ScaledLinear) else None
        kept = weight if keep_originals_on is None else weight.to(keep_originals_on)
        fusion.originals[name] = (kept, scale)
        if is_fp8:
            linear.set_dense_weight(dense, generator)
        else:
            linear.weight.data = dense.to(weight.dtype)
    return fusion


def _check_coverage(lora: Lora, covered: Coverage, allow_unmatched: bool) -> None:
    if not covered.unmatched or (allow_unmatched and covered.matched):
        return
    some = ", ".join(covered.unmatched[:6])
    rest = f" and {len(covered.unmatched) - 6} more" if len(covered.unmatched) > 6 else ""
    raise InputError(
        f"{lora.checkpoint.paths[0]}: {len(covered.unmatched)} of {len(lora.layers)} layers are "
        f"not in this model: {some}{rest}. The LoRA is for another model"
        + (", or allow unmatched layers." if covered.matched else ".")
    )


def _check_shapes(lora: Lora, module: nn.Module) -> None:
    """From headers alone, so that a misfit is found before any weight has changed."""
    for name, linear in _linears(module).items():
        if name not in lora.layers:
            continue
        down, up = (lora.checkpoint.tensors[key].shape for key in lora.layers[name])
        out_width, in_width = linear.weight.shape
        if len(down) != 2 or down[1] != in_width or up != (out_width, down[0]):
            raise CheckpointError(
                f"{lora.checkpoint.paths[0]}: {list(up)} x {list(down)} does not fit {name}, "
                f"which is {[out_width, in_width]}. The LoRA is for another model."
            )


def _linears(module: nn.Module) -> dict[str, nn.Linear | Fp8CastLinear | Fp8ScaledLinear]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Fp8CastLinear | Fp8ScaledLinear)
    }


def _positive_integer(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.metadata.get(key, 1)
    if not isinstance(value, int | float) or value < 1 or value != int(value):
        raise CheckpointError(f"{checkpoint.paths[0]}: {key} is {value!r}; it must be 1, 2, ...")
    return int(value)
