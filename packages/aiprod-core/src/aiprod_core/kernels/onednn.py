"""Products and convolutions by oneDNN, which PyTorch ships for CPUs but calls for few of them.

In float32 PyTorch multiplies by MKL. On AMD Zen 4, one core, 384 rows of 512 and 2,048: MKL 74 to
78 GFLOP/s, oneDNN 90 to 97 of a peak of about 105, and with GELU as its epilogue 91 where the two
apart reach 60. Weights packed once would give another 5 %; they are not, so that they take no more
memory and LoRAs may still change them in place. One product for q, k and v together gains nothing.

There is no derivative: with gradients on, the layers compute as ever. So they do in 16 bits, for
which PyTorch calls oneDNN by itself where the machine can.

Letters: C channels, F frames, H W height and width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.model.conv_blocks import CausalConv3d
from aiprod_core.model.layers import GELULinear

# Multiplications from which on oneDNN's greater cost of a call is worth it.
MIN_PRODUCT = 2**23


def is_available() -> bool:
    return torch.backends.mkldnn.is_available()


def is_faster_in_onednn(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() * weight.shape[0] >= MIN_PRODUCT


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not is_faster_in_onednn(x, layer.weight):
        return F.linear(x, layer.weight, layer.bias)
    return _product()(x, layer.weight, layer.bias, False)


def gelu_linear(layer: GELULinear, x: Tensor) -> Tensor:
    weight, bias = layer.proj.weight, layer.proj.bias
    if torch.is_grad_enabled() or not is_faster_in_onednn(x, weight):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return _product()(x, weight, bias, True)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, has_gelu: bool) -> Tensor:
    epilogue = ("gelu", [], "tanh") if has_gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *epilogue)


def _product() -> Callable[..., Tensor]:
    # torch.compile would open PyTorch's operator, and expects packed weights inside. It calls ours
    # as it is; outside of it the way over an operator written in Python would cost more.
    return torch.ops.aiprod.onednn_linear if torch.compiler.is_compiling() else onednn_linear


_library = torch.library.Library("aiprod", "DEF")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, bool has_gelu) -> Tensor")
_library.impl("onednn_linear", onednn_linear, "CPU")


@torch.library.register_fake("aiprod::onednn_linear")
def _shape_of_product(x: Tensor, weight: Tensor, bias: Tensor | None, has_gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def causal_conv3d(layer: CausalConv3d, x: Tensor) -> Tensor:
    """`CausalConv3d` as a sum of three 2D convolutions of frames, one a row of the kernel in time.

    Frames that are channels-last in 3D are so in 2D without a copy; the second and third products
    are added to the first as they are made, and edge frames are convolved once instead of being
    padded. Takes x (1, C, F, H, W).
    """
    conv = layer.conv
    if torch.is_grad_enabled() or not is_faster_in_2d(conv, x):
        return CausalConv3d.forward(layer, x)
    frames = x[0].movedim(1, 0)  # (F, C, H, W)
    padding = 1 if conv.padding_mode == "zeros" else 0
    if padding == 0:
        frames = F.pad(frames, (1, 1, 1, 1), mode=conv.padding_mode)
    steps = (-2, -1, 0) if layer.causal else (-1, 0, 1)
    weights = dict(zip(steps, conv.weight.unbind(2), strict=True))
    out = F.conv2d(frames, weights.pop(0), conv.bias, padding=padding)
    for step, weight in weights.items():
        # Where the step leads out of the clip, its edge frame takes the place.
        inside, edge = (out[-step:], out[:-step]) if step < 0 else (out[:-step], out[-step:])
        reached, last = (frames[:step], frames[:1]) if step < 0 else (frames[step:], frames[-1:])
        edge += F.conv2d(last, weight, padding=padding)
        if len(reached):
            _add_conv2d(inside, reached, weight, padding)
    return out.movedim(0, 1)[None]


def is_faster_in_2d(conv: nn.Conv3d, x: Tensor) -> bool:
    """By what one Zen 4 core measured, in GFLOP/s in 3D and in 2D, with channels last.

    Wins: 48 -> 128 channels 32 and 97, 48 -> 384 58 and 99, 128 -> 512 67 and 86, 192 -> 768 68 and
    75, 128 -> 48 91 and 98, 128 -> 128 85 and 101, 256 -> 256 82 and 106. Losses: 48, 96 and 192
    to as many 107, 111, 103 and 97, 96, 94. Below some 500 positions the weights are most of the
    work, and 2D lays them out three times: 256 -> 2048 at 192 positions 69 and 26.
    """
    if x.dtype != torch.float32 or len(x) != 1:
        return False
    if conv.stride != (1, 1, 1) or x[0, 0].numel() < 512:
        return False
    return conv.in_channels != conv.out_channels or conv.in_channels % 128 == 0


def _add_conv2d(out: Tensor, x: Tensor, weight: Tensor, padding: int) -> None:
    ones = [1, 1]
    torch.ops.mkldnn._convolution_pointwise_(
        out, x, weight, None, [padding] * 2, ones, ones, 1, "add", 1.0, None, [], None
    )
