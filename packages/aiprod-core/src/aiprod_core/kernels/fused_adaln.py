"""RMS norm, scale and shift in one pass.

PyTorch reads and writes the tokens two or three times for `norm(x) (1 + scale) + shift`; here each
row is read once and written once.

Letters: B batch, N tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiprod_core.model.transformer import modulated_norm

reference = modulated_norm


def fused_adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x (B, N, D); scale, shift (B or 1, N or 1, D). Returns (B, N, D)."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    scale, shift = (row.expand(batch, tokens, width) for row in (scale, shift))
    out = torch.empty_like(x)
    _adaln[(batch * tokens,)](
        x, scale, shift, out,
        tokens, width, scale.stride(0), scale.stride(1), shift.stride(0), shift.stride(1), eps,
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out


@triton.jit
def _adaln(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    tokens, width, scale_b, scale_n, shift_b, shift_n, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_b + n * scale_n + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + b * shift_b + n * shift_n + column, mask=inside, other=0.0)
    y = x * tl.rsqrt(tl.sum(x * x) / width + eps)
    y = y * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(out_ptr + row * width + column, y.to(out_ptr.dtype.element_ty), mask=inside)
