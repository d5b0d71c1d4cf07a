"""RMS norms on a CPU in fewer passes over the tokens.

PyTorch's takes five there: squares, their mean, the root, the product, the weight, with a tensor of
x's size between. Here the length of each row is taken in one pass and divided out in another, and
in small networks, where it is the calls that take the time, self-attention's queries and keys are
normalised and rotated together.

There is no derivative: with gradients on, and in 16 bits, the references compute.

Letters: B batch, N tokens, D width.
"""

import torch
from torch import Tensor, nn

from aiprod_core.kernels.onednn import is_faster_in_onednn
from aiprod_core.model import layers, transformer
from aiprod_core.model.layers import Attention
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


def queries_keys_values(
    attention: Attention,
    x: Tensor,
    context: Tensor,
    rotary: Rotary | None,
    context_rotary: Rotary | None,
) -> tuple[Tensor, Tensor, Tensor]:
    pair = attention.to_q, attention.to_k
    is_self = context is x and context_rotary is rotary
    if (
        not is_self
        or not _applies(x)
        or any(type(linear) is not nn.Linear for linear in pair)
        or is_faster_in_onednn(x, attention.to_q.weight)
    ):
        return Attention.queries_keys_values(attention, x, context, rotary, context_rotary)
    both = x.new_empty(2, *x.shape[:-1], attention.to_q.out_features)
    for linear, out in zip(pair, both.flatten(1, -2), strict=True):
        torch.addmm(linear.bias, x.flatten(0, -2), linear.weight.t(), out=out)
    weights = torch.stack((attention.q_norm.weight, attention.k_norm.weight))[:, None, None]
    both = (both * _inverse(both, attention.q_norm.eps)).mul_(weights)
    if rotary is not None:
        both = rotate(both, rotary, attention.heads)
    q, k = attention.split_heads(both)
    return q, k, attention.split_heads(attention.to_v(x))


def _applies(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_grad_enabled()


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps), (B, N, 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # eps + length^2 / D in one call; in place step by step would take twice as long.
    return torch.addcmul(torch.full((), eps), length, length, value=1 / x.shape[-1]).rsqrt_()
