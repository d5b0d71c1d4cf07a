"""Making a large network fit a small card: recomputed activations, blocks in RAM, a quantised base.

All three are applied from outside to a built transformer; its blocks keep their names and do not
know. Only weights that are not trained are quantised or swapped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aiprod_core.errors import InputError

# The file's names of the linear layers that carry nearly all weights of a block.
QUANTIZED = "transformer_blocks."


def recompute_activations(blocks: Sequence[nn.Module]) -> None:
    """Each block keeps its inputs alone and runs again in the backward pass."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def keep_in_ram(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """The frozen weights of these blocks live in RAM and visit the device while a block runs.

    To be followed by `recompute_activations`: then the backward pass, too, holds the weights of one
    block at a time, those that its recomputation fetched.
    """
    for block in blocks:
        slots = []
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.requires_grad:
                    continue
                value = parameter.detach().to("cpu")
                if device.type == "cuda":
                    value = value.pin_memory()  # so that copies run beside the arithmetic
                resident = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = resident
                slots.append((module, name, resident))
        block.forward = partial(_visiting, block.forward, slots, device)


def _visiting(forward: Any, slots: list, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    with _on_device(slots, device):
        return forward(*args, **kwargs)


@contextmanager
def _on_device(slots: list, device: torch.device) -> Iterator[None]:
    for module, name, resident in slots:
        visiting = resident.detach().to(device, non_blocking=True)
        module._parameters[name] = nn.Parameter(visiting, requires_grad=False)
    try:
        yield
    finally:
        # The graph of this block holds on to the copies for as long as it needs them.
        for module, name, resident in slots:
            module._parameters[name] = resident


def quantize_base(transformer: nn.Module, scheme: str, device: torch.device) -> None:
    """Turns the blocks' linear layers into int8 or NF4 ones on `device`, one after another.

    Activations stay as they are, and gradients flow through to what was attached to the layers.
    Raises InputError where the package is not installed.
    """
    quantize = {"int8": _int8, "nf4": _nf4}[scheme]
    for name, linear in list(transformer.named_modules()):
        if isinstance(linear, nn.Linear) and name.startswith(QUANTIZED):
            transformer.set_submodule(name, quantize(linear.to(device)))


def _int8(linear: nn.Linear) -> nn.Module:
    """One scale a row (torchao)."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise InputError(
            "acceleration.quantization int8 needs a package: pip install torchao"
        ) from None
    holder = nn.Sequential(linear)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0].requires_grad_(False)


def _nf4(linear: nn.Linear) -> nn.Module:
    """Four bits at the quantiles of a normal distribution (QLoRA, arXiv:2305.14314)."""
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError:
        raise InputError(
            "acceleration.quantization nf4 needs a package: pip install bitsandbytes"
        ) from None
    weight: Tensor = linear.weight.data
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
    )
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")  # pyright: ignore[reportCallIssue]
    layer.bias = linear.bias
    return layer.to(weight.device).requires_grad_(False)
