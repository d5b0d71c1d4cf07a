"""LoRA files (arXiv:2106.09685): read, checked against a network, fused and taken out again.

Fusing adds `strength * B A` to the weights, so that inference costs nothing extra. What the files
of different tools look like is in lora_formats.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import Checkpoint, assign, open_checkpoint
from aiprod_core.loader.lora_formats import Change, aliases, read_changes
from aiprod_core.quantization.weight_only import QuantizedLinear

Linear = nn.Linear | QuantizedLinear


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
    changes, unmatched = changes_of(module, lora)
    return Coverage(tuple(changes), unmatched)


@dataclass
class Fusion:
    """What `fuse` replaced. Take several out in the reverse of the order they were put in."""

    module: nn.Module
    originals: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def fused(self) -> dict[str, Tensor]:
        """What stands in place of the originals, by its name in the module; for `put_fused`."""
        found: dict[str, Tensor] = {}
        for layer_name, kept in self.originals.items():
            layer = self.module.get_submodule(layer_name)
            found |= {f"{layer_name}.{leaf}": getattr(layer, leaf).data for leaf in kept}
        return found

    @torch.no_grad()
    def unfuse(self) -> None:
        """Puts the base weights back, bit for bit."""
        for name, kept in self.originals.items():
            linear = self.module.get_submodule(name)
            device = linear.get_parameter("weight").device
            for leaf, tensor in kept.items():
                if leaf == "weight":
                    linear.get_parameter("weight").data = tensor.to(device)
                else:
                    setattr(linear, leaf, tensor.to(device))
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
    `round_to` where given (published pipelines round to bfloat16 even on float32 weights).
    Quantised weights are rounded at random where a generator is given. The originals stay where
    they are, or move to `keep_originals_on`. Adapters with strength 0 are left out.

    Raises InputError when layers of an adapter are not in the module, unless `allow_unmatched` and
    some are; CheckpointError when matrices do not fit their layer.
    """
    linears = _linears(module)
    active: list[tuple[dict[str, Change], dict[str, Tensor], float]] = []
    for lora, strength in adapters:
        if strength == 0:
            continue
        changes, unmatched = changes_of(module, lora)
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
        is_quantized = isinstance(linear, QuantizedLinear)
        dense = (linear.dense_weight() if is_quantized else linear.weight).float()
        for change, tensors, strength in deltas:
            matrices = {key: tensors[key].to(dense.device).float() for key in change.keys}
            dense = dense + strength * change.delta(matrices)
        if round_to is not None:
            dense = dense.to(round_to)
        fusion.originals[name] = {
            leaf: tensor if keep_originals_on is None else tensor.to(keep_originals_on)
            for leaf, tensor in (("weight", linear.weight.data), *linear.named_buffers())
        }
        if is_quantized:
            linear.set_dense_weight(dense, generator)
        else:
            linear.weight.data = dense.to(linear.weight.dtype)
    return fusion


@torch.no_grad()
def put_fused(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    keep_originals_on: torch.device | str | None = None,
) -> Fusion:
    """Puts in place what `fuse` made earlier of an equal module and the same adapters.

    The tensors are copied to where the module is; where its own weights were left on the meta
    device (`load_transformer(left=...)`), they stay where they are.
    """
    fusion = Fusion(module)
    for name, tensor in tensors.items():
        layer_name, _, leaf = name.rpartition(".")
        original = getattr(module.get_submodule(layer_name), leaf).data
        fusion.originals.setdefault(layer_name, {})[leaf] = (
            original if keep_originals_on is None else original.to(keep_originals_on)
        )
        # A copy: what is mapped from a file starts anywhere, and products may round by where.
        is_left = original.device.type == "meta"
        assign(module, name, tensor.to(tensor.device if is_left else original.device, copy=True))
    return fusion


def check_shapes(module: nn.Module, lora: Lora) -> None:
    """Raises CheckpointError when matrices do not fit their layer. Looks at headers alone, so the
    module may be on the meta device."""
    linears, infos = _linears(module), lora.checkpoint.tensors
    for name, change in changes_of(module, lora)[0].items():
        linear = linears[name]
        if change.shape(infos) != (linear.out_features, linear.in_features):
            shapes = " and ".join(str(list(infos[key].shape)) for key in change.keys)
            raise CheckpointError(
                f"{lora.checkpoint.paths[0]}: {shapes} do not fit {name}, which is "
                f"{[linear.out_features, linear.in_features]}. The LoRA is for another model."
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


def changes_of(module: nn.Module, lora: Lora) -> tuple[dict[str, Change], tuple[str, ...]]:
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
        if isinstance(layer, nn.Linear | QuantizedLinear)
    }


def _positive_integer(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.metadata.get(key, 1)
    if not isinstance(value, int | float) or value < 1 or value != int(value):
        raise CheckpointError(f"{checkpoint.paths[0]}: {key} is {value!r}; it must be 1, 2, ...")
    return int(value)
