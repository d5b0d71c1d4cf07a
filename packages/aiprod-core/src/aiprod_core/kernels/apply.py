"""Faster equal forms of what a network computes, swapped in from outside.

The networks name the places: the linear layers, `Attention.rotated_norm`, `Block.modulated_norm`,
`Attention.queries_keys_values`, `Block.add_norm`, `Block.feed_forward`, `GELULinear`,
`CausalConv3d` and a plain vocoder's convolutions. A swap hides the class's function by one of the
instance, so weights, names and submodules stay; weights may still be moved or fused with LoRAs.

On CUDA these are the Triton kernels of this package, on a CPU oneDNN's products, convolutions in
fewer multiplications, and for sound weights with channels last. Layers that quantisation has
replaced are left alone.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.errors import InputError
from aiprod_core.kernels import convolution, cpu_norms, onednn, sound
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder
from aiprod_core.model.conv_blocks import CausalConv3d
from aiprod_core.model.layers import Attention, FeedForward, GELULinear
from aiprod_core.model.transformer import Block, Stream, Transformer, gated_sum, rows_of
from aiprod_core.model.vocoder import Generator
from aiprod_core.quantization.fp8 import Fp8ScaledLinear


class Swap(NamedTuple):
    name: str
    module: nn.Module
    attribute: str
    kernel: Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """What was swapped in."""

    swaps: list[Swap]

    @property
    def counts(self) -> dict[str, int]:
        """In how many places, by kernel."""
        return dict(Counter(swap.name for swap in self.swaps))

    def disable(self) -> None:
        for swap in self.swaps:
            delattr(swap.module, swap.attribute)


def enable_kernels(model: nn.Module, device: torch.device | None = None) -> Kernels:
    """Swaps in what is fastest on `device`, by default that of the weights, for inference.

    Places that are hidden already stay so: a second call swaps nothing. Raises InputError where a
    GPU's kernels find no Triton, a CPU's no oneDNN, and for other devices.
    """
    device = device or next(model.parameters()).device
    if device.type == "cuda":
        swaps = _on_cuda(model)
    elif device.type == "cpu":
        swaps = _on_cpu(model)
    else:
        raise InputError(f"there are no kernels for device {device.type}; only for cuda and cpu")
    swaps = [swap for swap in swaps if swap.attribute not in vars(swap.module)]
    for swap in swaps:
        setattr(swap.module, swap.attribute, swap.kernel)
    return Kernels(swaps)


def _on_cpu(model: nn.Module) -> list[Swap]:
    if not onednn.is_available():
        raise InputError("the kernels for CPUs need a PyTorch with oneDNN, which this one is not")
    swaps, norm = [], "norm in fewer passes"
    for module in model.modules():
        if isinstance(module, Attention):
            linears = [module.to_q, module.to_k, module.to_v, module.to_out[0]]
            swaps.append(Swap(norm, module, "rotated_norm", cpu_norms.rotated_norm))
            together = partial(cpu_norms.queries_keys_values, module)
            swaps.append(Swap("q and k together", module, "queries_keys_values", together))
        elif isinstance(module, FeedForward):
            linears = [module.net[2]]
        else:
            linears = []
        if isinstance(module, Block):
            swaps.append(Swap(norm, module, "modulated_norm", cpu_norms.modulated_norm))
            swaps.append(Swap(norm, module, "add_norm", cpu_norms.add_norm))
        swaps += [
            Swap("oneDNN linear", linear, "forward", partial(onednn.linear, linear))
            for linear in linears
            if type(linear) is nn.Linear
        ]
        if isinstance(module, GELULinear) and type(module.proj) is nn.Linear:
            kernel = partial(onednn.gelu_linear, module)
            swaps.append(Swap("oneDNN linear with GELU", module, "forward", kernel))
        elif isinstance(module, CausalConv3d):
            kernel = partial(convolution.causal_conv3d, module)
            swaps.append(Swap("convolution in fewer multiplications", module, "forward", kernel))
        elif isinstance(module, AudioEncoder | AudioDecoder):
            # PyTorch's own convolutions follow the weights' layout, so that nothing is swapped.
            module.to(memory_format=sound.LAST)  # type: ignore[call-overload]
        elif isinstance(module, Generator) and module.is_plain:
            for layer in module.modules():
                if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                    sound.put_channels_last(layer)
                    kernel = partial(sound.conv1d, layer)
                    swaps.append(Swap("sound with channels last", layer, "forward", kernel))
    return swaps


def _on_cuda(model: nn.Module) -> list[Swap]:
    try:
        from aiprod_core.kernels.fused_adaln import fused_adaln
        from aiprod_core.kernels.fused_adaln_fp8 import fused_adaln_fp8
        from aiprod_core.kernels.fused_gate import fused_gate
        from aiprod_core.kernels.fused_gelu import fused_gelu
        from aiprod_core.kernels.fused_qk_rope import fused_qk_rope
    except ModuleNotFoundError as error:
        raise InputError("the kernels for GPUs need Triton; run pip install triton") from error

    def gelu_linear(layer: GELULinear, x: Tensor) -> Tensor:
        return fused_gelu(F.linear(x, layer.proj.weight), layer.proj.bias)

    def feed_forward(block: Block, x: Tensor, stream: Stream, ff: FeedForward, table: Tensor):
        up: Any = ff.net[0].proj
        if not _takes_fp8(ff):
            return Block.feed_forward(block, x, stream, ff, table)
        shift, scale, gate = rows_of(table, stream.modulation, 3, 6)
        rows = fused_adaln_fp8(x, scale, shift, block.eps, up.input_scale)
        hidden = F.gelu(up.product(rows, up.input_scale, x.dtype), approximate="tanh")
        return gated_sum(x, gate, ff.net[2](hidden))

    swaps = []
    for module in model.modules():
        if isinstance(module, Attention):
            swaps.append(Swap("q/k norm + rotary", module, "rotated_norm", fused_qk_rope))
        elif isinstance(module, Block):
            swaps.append(Swap("norm + scale + shift", module, "modulated_norm", fused_adaln))
            swaps.append(Swap("gated residual + norm", module, "add_norm", fused_gate))
            if any(_takes_fp8(ff) for ff in module.children()):
                swaps.append(
                    Swap("norm to FP8", module, "feed_forward", partial(feed_forward, module))
                )
        elif isinstance(module, GELULinear) and type(module.proj) is nn.Linear:
            swaps.append(Swap("bias + GELU", module, "forward", partial(gelu_linear, module)))
    return swaps


def _takes_fp8(ff: nn.Module) -> bool:
    """Whether a feed-forward's input is to be rounded to 8 bits by a scale that is known."""
    if not isinstance(ff, FeedForward):
        return False
    up = ff.net[0].proj
    return isinstance(up, Fp8ScaledLinear) and up.input_scale is not None


def compile_blocks(transformer: Transformer, **options: Any) -> None:
    """Compiles one block, for all: they share code, so that the first pays for the others.

    `options` are those of `torch.compile`. Swap kernels in before, not after.
    """
    for block in transformer.transformer_blocks:
        block.compile(**options)
