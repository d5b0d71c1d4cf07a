"""LoRA in training (arXiv:2106.09685): attach to a frozen network, read, write in published names.

A file holds `diffusion_model.LAYER.lora_A.weight` (rank, in) and `.lora_B.weight` (out, rank), and
no alpha, as LTX-2's own files: alpha / rank is multiplied into B when it is written. ComfyUI and
diffusers read it; what other tools write is read by `loader.lora`.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from aiprod_core.errors import InputError
from aiprod_core.loader.lora import open_lora
from aiprod_core.loader.lora_formats import LowRank, aliases

PUBLISHED_PREFIX = "diffusion_model."


class LoraLinear(nn.Module):
    """base(x) + alpha / rank B A dropout(x). A and B are float32 and compute in x's type."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], rank: int, scale: float, p: float):
        super().__init__()
        out_width, in_width = shape
        self.base, self.scale, self.p = base, scale, p
        self.lora_A = nn.Parameter(torch.empty(rank, in_width))
        self.lora_B = nn.Parameter(torch.zeros(out_width, rank))

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.p, self.training) if self.p else x
        low = F.linear(dropped, self.lora_A.to(x.dtype))
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype)) * self.scale


def attach(
    module: nn.Module,
    layers: Iterable[str],  # names, such as `target_layers` finds
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Freezes `module` and wraps linear layers of it.

    A starts uniform as nn.Linear does, B at zero, so that nothing changes at first.
    """
    module.requires_grad_(False)
    for name in layers:
        base = module.get_submodule(name)
        device = next(base.parameters()).device
        shape = (base.out_features, base.in_features)
        layer = LoraLinear(base, shape, rank, alpha / rank, dropout)  # pyright: ignore[reportArgumentType]
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5), generator=generator)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.to(device), layer.lora_B.to(device)
        module.set_submodule(name, layer)


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """The network as it is without its attached layers."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLinear)]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def target_layers(module: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Linear layers whose name is a pattern or ends in "." and it.

    Raises InputError for a pattern that matches nothing, naming the layers that there are.
    """
    linears = [name for name, layer in module.named_modules() if hasattr(layer, "in_features")]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in linears if f".{name}".endswith(f".{pattern}")]
        if not found:
            leaves = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in linears})
            raise InputError(
                f"lora.target_modules: no layer ends in {pattern}; layers are {', '.join(leaves)}."
            )
        chosen.update(found)
    return [name for name in linears if name in chosen]


def lora_tensors(trained: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Published names and values of parameters `LAYER.lora_A`, `LAYER.lora_B` of a network."""
    return {
        f"{PUBLISHED_PREFIX}{name}.weight": value * scale if name.endswith("lora_B") else value
        for name, value in trained.items()
    }


def save_lora(
    path: Path,
    trained: Mapping[str, Tensor],
    *,
    scale: float,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a LoRA file, under a temporary name first. `scale` is alpha / rank."""
    tensors = {
        name: value.detach().to("cpu", dtype).contiguous()
        for name, value in lora_tensors(trained, scale).items()
    }
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
    os.replace(temporary, path)


@torch.no_grad()
def load_lora(module: nn.Module, path: Path) -> None:
    """Fills attached layers from a LoRA file of any tool.

    Raises InputError when it has other layers, another rank, or matrices of another kind.
    """
    lora = open_lora(path)
    layers = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)
    }
    names = aliases(layers)
    unmatched = [layer for layer in lora.layers if layer not in names]
    missing = layers.keys() - {names.get(layer) for layer in lora.layers}
    if unmatched or missing:
        raise InputError(
            f"{path}: its layers are not those of lora.target_modules "
            f"({', '.join([*unmatched, *sorted(missing)][:3])} ...); set target_modules as it was "
            "trained."
        )
    for layer, change in lora.layers.items():
        if not isinstance(change, LowRank):
            raise InputError(f"{path}: {layer} is no pair of low-rank matrices; it cannot go on.")
        target = layers[names[layer]]
        tensors = lora.checkpoint.read(change.keys)
        down, up = tensors[change.down].float(), tensors[change.up].float()
        if down.shape != target.lora_A.shape or up.shape != target.lora_B.shape:
            raise InputError(
                f"{path}: {layer} has rank {down.shape[0]}; set lora.rank {down.shape[0]}."
            )
        target.lora_A.copy_(down)
        target.lora_B.copy_(up * (change.scale / target.scale))
