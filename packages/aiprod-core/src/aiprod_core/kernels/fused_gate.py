"""Gated residual and the norm that comes next in one pass.

`x + gate out` and its RMS norm: the sum is still in registers when its squares are added up, so the
tokens are not read again.

Letters: B batch, N tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiprod_core.model.transformer import add_norm

reference = add_norm


def fused_gate(x: Tensor, gate: Tensor | None, out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, out (B, N, D); gate (B or 1, N or 1, D), None for 1. The sum and its norm, (B, N, D)."""
    x, out = x.contiguous(), out.contiguous()
    batch, tokens, width = x.shape
    gates = out if gate is None else gate.expand(batch, tokens, width)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _gate[(batch * tokens,)](
        x, gates, out, total, normed, tokens, width, gates.stride(0), gates.stride(1), eps,
        HAS_GATE=gate is not None, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return total, normed


@triton.jit
def _gate(
    x_ptr, gate_ptr, out_ptr, total_ptr, normed_ptr, tokens, width, gate_b, gate_n, eps,
    HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + b * gate_b + n * gate_n + column, mask=inside, other=0.0)
        out = out * gate.to(tl.float32)
    total = (x + out).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + place, total, mask=inside)
    total = total.to(tl.float32)  # what is normalised is what was stored
    normed = total * tl.rsqrt(tl.sum(total * total) / width + eps)
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)
