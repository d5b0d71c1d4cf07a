"""LoRA files (arXiv:2106.09685): read, checked against a network, fused and taken out again.

Fusing adds `strength * B A` to the weights, so that inference costs nothing extra. What the files
of different tools look like is in lora_formats.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint
from aiprod_core.loader.lora_formats import Change, aliases, read_changes
from aiprod_core.quantization.fp8 import Fp8CastLinear, Fp8ScaledLinear

Linear = nn.Linear | Fp8CastLinear | Fp8ScaledLinear


@dataclass(frozen=True)
class Lora:
    """An opened file: `layers` maps the file's names of layers, without prefix, to their change.

    No matrix is read yet. `unrecognised` are keys that are no part of an adapter. The factors say
    at which fraction of the clip's resolution and frame rate an IC-LoRA expects its reference
    video; 1 for other LoRAs.
    """

    checkpoint: Checkpoint
    layers: dict[str, Change]
    unrecognised: tuple[str, ...] = ()
    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(c.rank(self.checkpoint.tensors) or 0 for c in self.layers.values())


class Coverage(NamedTuple):
    """Layers of a network that a LoRA changes, and names in its file that the network lacks."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.matched) + len(self.unmatched)
        return f"{len(self.matched)} of {total} layers applied"


def open_lora(path: str | Path) -> Lora:
    """Reads the header and the alphas. Raises CheckpointError when it is no LoRA, or half of one,
    or of a kind that is not supported."""
    checkpoint = open_checkpoint(path)
    layers, unrecognised = read_changes(checkpoint)
    if not layers:
        some = ", ".join(list(checkpoint.tensors)[:3])
        raise CheckpointError(
            f"{path}: no LoRA, LoKr or LoHa matrices in this file; it holds {some or 'nothing'}"
        )
    return Lora(
        checkpoint,
        layers,
        unrecognised,
        _positive_integer(checkpoint, "reference_downscale_factor"),
        _positive_integer(checkpoint, "reference_temporal_scale_factor"),
    )


def coverage(module: nn.Module, lora: Lora) -> Coverage:
    """Which linear layers of `module` the LoRA changes; prints as "432 of 432 layers applied"."""
    changes, unmatched = _changes_of(module, lora)
    return Coverage(tuple(changes), unmatched)


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
    linears = _linears(module)
    active: list[tuple[dict[str, Change], dict[str, Tensor], float]] = []
    for lora, strength in adapters:
        if strength == 0:
            continue
        changes, unmatched = _changes_of(module, lora)
        _check_coverage(lora, Coverage(tuple(changes), unmatched), allow_unmatched)
        check_shapes(module, lora)
        keys = (key for change in changes.values() for key in change.keys)
        active.append((changes, lora.checkpoint.read(keys), strength))
    fusion = Fusion(module)
    for name, linear in linears.items():
        deltas = [
            (changes[name], tensors, strength)
            for changes, tensors, strength in active
            if name in changes
        ]
        if not deltas:
            continue
        is_fp8 = isinstance(linear, Fp8CastLinear | Fp8ScaledLinear)
        dense = (linear.dense_weight() if is_fp8 else linear.weight).float()
        for change, tensors, strength in deltas:
            matrices = {key: tensors[key].to(dense.device).float() for key in change.keys}
            dense = dense + strength * change.delta(matrices)
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


def check_shapes(module: nn.Module, lora: Lora) -> None:
    """Raises CheckpointError when matrices do not fit their layer. Looks at headers alone, so the
    module may be on the meta device."""
    linears, infos = _linears(module), lora.checkpoint.tensors
    for name, change in _changes_of(module, lora)[0].items():
        if change.shape(infos) != tuple(linears[name].weight.shape):
            shapes = " and ".join(str(list(infos[key].shape)) for key in change.keys)
            raise CheckpointError(
                f"{lora.checkpoint.paths[0]}: {shapes} do not fit {name}, which is "
                f"{list(linears[name].weight.shape)}. The LoRA is for another model."
            )


def _check_coverage(lora: Lora, covered: Coverage, allow_unmatched: bool) -> None:
    if not covered.unmatched or (allow_unmatched and covered.matched):
        return
    total = len(covered.matched) + len(covered.unmatched)
    some = ", ".join(covered.unmatched[:6])
    rest = f" and {len(covered.unmatched) - 6} more" if len(covered.unmatched) > 6 else ""
    raise InputError(
        f"{lora.checkpoint.paths[0]}: {len(covered.unmatched)} of {total} layers are "
        f"not in this model: {some}{rest}. The LoRA is for another model"
        + (", or allow unmatched layers." if covered.matched else ".")
    )


def _changes_of(module: nn.Module, lora: Lora) -> tuple[dict[str, Change], tuple[str, ...]]:
    """The LoRA's changes by the network's own names, and what the network does not have."""
    names = aliases(_linears(module))
    changes: dict[str, Change] = {}
    unmatched = list(lora.unrecognised)
    for layer, change in lora.layers.items():
        name = names.get(layer)
        if name is None:
            unmatched.append(layer)
        elif name in changes:
            raise CheckpointError(f"{lora.checkpoint.paths[0]}: {name} is changed twice.")
        else:
            changes[name] = change
    return changes, tuple(unmatched)


def _linears(module: nn.Module) -> dict[str, Linear]:
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
