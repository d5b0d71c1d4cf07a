"""Low-rank changes of a network's weights: several on one base, taken from a difference, published.

`share_weights` lets one network speak as several; `nearest` is the best change of a rank in the
least squares (Eckart and Young, 1936), which is how a LoRA is extracted from a tuned model.

Letters: r rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint
from aiprod_core.loader.convert import Entry, write_safetensors
from aiprod_pipelines.companions import model_name
from aiprod_trainer.adapters import save_lora


class LowRank(NamedTuple):
    """A change of a weight (out, in): up (out, r) times down (r, in)."""

    down: Tensor
    up: Tensor


# By the name of the layer; a whole difference (out, in) or a low-rank one.
Changes = Mapping[str, Tensor | LowRank]


class Change(nn.Module):
    """A trainable low-rank change, nothing at first."""

    def __init__(self, in_width: int, out_width: int, rank: int, generator: torch.Generator | None):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_width))
        self.up = nn.Parameter(torch.zeros(out_width, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class SharedLinear(nn.Module):
    """A frozen layer plus the change of whoever computes; `role` is set from outside."""

    def __init__(self, base: nn.Module, changes: Mapping[str, Change]):
        super().__init__()
        self.base, self.changes = base, nn.ModuleDict(changes)
        self.role = ""

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # asked for its type  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.changes[self.role](x) if self.role in self.changes else y


@dataclass(frozen=True)
class Shared:
    """One network that speaks as several."""

    network: nn.Module
    layers: dict[str, SharedLinear]
    changes: dict[str, nn.ModuleList]  # of each role, in the order of the layers

    def speaking_as(self, role: str) -> Callable[..., Any]:
        """The network with a role's changes; with those of none for any other name."""

        def call(*args: Any) -> Any:
            for layer in self.layers.values():
                layer.role = role
            return self.network(*args)

        return call

    def low_rank_changes(self, role: str) -> dict[str, LowRank]:
        changes = zip(self.layers, self.changes[role], strict=True)
        return {
            name: LowRank(change.down.detach(), change.up.detach())  # pyright: ignore
            for name, change in changes
        }


def share_weights(
    network: nn.Module,
    roles: Sequence[str],
    *,
    rank: int,
    generator: torch.Generator | None = None,
) -> Shared:
    """Freezes a network and gives all its linear layers a change for each role, alike at first."""
    network.requires_grad_(False)
    layers: dict[str, SharedLinear] = {}
    for name, base in list(network.named_modules()):
        if not isinstance(base, nn.Linear):
            continue
        first = Change(base.in_features, base.out_features, rank, generator).to(base.weight.device)
        changes = {role: Change(base.in_features, base.out_features, rank, None) for role in roles}
        for change in changes.values():
            change.load_state_dict(first.state_dict())
            change.to(base.weight.device)
        layers[name] = SharedLinear(base, changes)
        network.set_submodule(name, layers[name])
    own = {role: nn.ModuleList(layer.changes[role] for layer in layers.values()) for role in roles}
    return Shared(network, layers, own)


def nearest(difference: Tensor, rank: int) -> LowRank:
    """The closest low-rank change to a difference (out, in); exact where the rank suffices."""
    u, s, v = torch.linalg.svd(difference.float(), full_matrices=False)
    root = s[:rank].sqrt()  # shared between both, so that neither loses bits
    return LowRank(root[:, None] * v[:rank], u[:, :rank] * root)


def publish(
    base: Checkpoint,
    changes: Changes,
    folder: Path,
    *,
    rank: int,
    writes_model: bool = True,
) -> list[Path]:
    """Writes `NAME-distilled-lora-RANK.safetensors` and, as asked, `NAME-distilled.safetensors`.

    Changes that are whole differences are brought to the rank for the LoRA; the model has them
    whole. Of a low-rank one the model is written by `aiprod models convert`. Both say of themselves
    that they are distilled, and keep the base's other metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = model_name(base)
    low = {k: c if isinstance(c, LowRank) else nearest(c, rank) for k, c in changes.items()}
    tensors = {f"{k}.lora_A": c.down for k, c in low.items()}
    tensors |= {f"{k}.lora_B": c.up for k, c in low.items()}
    lora = folder / f"{name}-distilled-lora-{rank}.safetensors"
    dtype = base.tensors[key_maps.TRANSFORMER.publish(f"{next(iter(low))}.weight")].dtype
    save_lora(lora, tensors, scale=1.0, dtype=dtype, metadata={"base_model": base.name})
    if not writes_model:
        return [lora]
    model = folder / f"{name}-distilled.safetensors"
    added = {key_maps.TRANSFORMER.publish(f"{k}.weight"): change for k, change in changes.items()}

    def summed(entries: Sequence[Entry]):
        for entry in entries:
            tensor = base.fetch(entry.key)
            change = added.get(entry.key)
            if isinstance(change, LowRank):
                change = change.up.float() @ change.down.float()
            if change is not None:
                tensor = (tensor.float() + change.detach().cpu().float()).to(entry.dtype)
            yield tensor

    entries = [Entry(key, info.shape, info.dtype) for key, info in base.tensors.items()]
    metadata = {**base.metadata, "distilled": {"steps": [8, 4], "from": base.name}}
    write_safetensors(model, entries, summed, metadata)
    return [model, lora]
