"""Norm of queries or keys, its weight, and the rotation in one pass.

A row holds all heads of a token. Element i of its first halves and its partner are loaded together,
so that both are rotated where they are, in either pairing of `model.rope`.

Letters: B batch, N tokens, D width over all heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiprod_core.model.layers import rotated_norm
from aiprod_core.model.rope import Rotary

reference = rotated_norm


def fused_qk_rope(
    x: Tensor, weight: Tensor, eps: float, rotary: Rotary | None, heads: int
) -> Tensor:
    """x (B, N, D), weight (D,); the table may have a batch of 1. Returns (B, N, D)."""
    if rotary is None:
        return reference(x, weight, eps, rotary, heads)
    x = x.contiguous()
    batch, tokens, width = x.shape
    cos, sin = (table.expand(batch, tokens, width // 2) for table in rotary[:2])
    out = torch.empty_like(x)
    _qk_rope[(batch * tokens,)](
        x, weight, cos, sin, out,
        tokens, width, width // heads, cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1),
        eps, INTERLEAVED=rotary.is_interleaved, BLOCK=triton.next_power_of_2(width // 2),
    )  # fmt: skip
    return out


@triton.jit
def _qk_rope(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr,
    tokens, width, head_width, cos_b, cos_n, sin_b, sin_n, eps,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    pair = tl.arange(0, BLOCK)
    inside = pair < width // 2
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    else:
        half = head_width // 2
        first = pair // half * head_width + pair % half
        second = first + half
    x = tl.load(x_ptr + row * width + first, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + row * width + second, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x + y * y) / width + eps)
    x = x * scale * tl.load(weight_ptr + first, mask=inside, other=0.0).to(tl.float32)
    y = y * scale * tl.load(weight_ptr + second, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + b * cos_b + n * cos_n + pair, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + b * sin_b + n * sin_n + pair, mask=inside, other=0.0).to(tl.float32)
    turned, partner = x * cos - y * sin, y * cos + x * sin
    out = out_ptr + row * width
    tl.store(out + first, turned.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + second, partner.to(out_ptr.dtype.element_ty), mask=inside)
