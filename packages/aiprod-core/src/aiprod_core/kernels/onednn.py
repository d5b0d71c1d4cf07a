"""Products by oneDNN, which PyTorch ships for CPUs but calls for few of them.

In float32 PyTorch multiplies by MKL. On AMD Zen 4, one core, 384 rows of 512 and 2,048: MKL 74 to
78 GFLOP/s, oneDNN 90 to 97 of a peak of about 105, and with GELU as its epilogue 91 where the two
apart reach 60. Weights packed once would give another 5 %; they are not, so that they take no more
memory and LoRAs may still change them in place. One product for q, k and v together gains nothing.

There is no derivative: with gradients on, the layers compute as ever. So they do in 16 bits, for
which PyTorch calls oneDNN by itself where the machine can.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


_library = torch.library.Library("aiprod", "FRAGMENT")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, bool has_gelu) -> Tensor")
_library.impl("onednn_linear", onednn_linear, "CPU")


@torch.library.register_fake("aiprod::onednn_linear")
def _shape_of_product(x: Tensor, weight: Tensor, bias: Tensor | None, has_gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
