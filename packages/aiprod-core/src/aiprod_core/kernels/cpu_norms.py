"""RMS norms on a CPU in fewer passes over the tokens.

PyTorch's takes five there: squares, their mean, the root, the product, the weight, with a tensor of
x's size between. Here the length of each row is taken in one pass and divided out in another.

There is no derivative: with gradients on, and in 16 bits, the references compute.

Letters: B batch, N tokens, D width.
"""

import torch
from torch import Tensor

from aiprod_core.model import layers, transformer
from aiprod_core.model.rope import Rotary, rotate


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    if not _applies(x):
        return transformer.modulated_norm(x, scale, shift, eps)
    return torch.addcmul(shift, x * _inverse(x, eps), 1 + scale)


def add_norm(x: Tensor, gate: Tensor | None, out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _applies(x):
        return transformer.add_norm(x, gate, out, eps)
    x = x + out if gate is None else transformer.gated_sum(x, gate, out)
    return x, x * _inverse(x, eps)


def rotated_norm(
    x: Tensor, weight: Tensor, eps: float, rotary: Rotary | None, heads: int
) -> Tensor:
    if not _applies(x):
        return layers.rotated_norm(x, weight, eps, rotary, heads)
    x = (x * _inverse(x, eps)).mul_(weight)
    return x if rotary is None else rotate(x, rotary, heads)


def _applies(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_grad_enabled()


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps), (B, N, 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # eps + length^2 / D in one call: in small models it is the calls that take the time.
    return torch.addcmul(torch.full((), eps), length, length, value=1 / x.shape[-1]).rsqrt_()
