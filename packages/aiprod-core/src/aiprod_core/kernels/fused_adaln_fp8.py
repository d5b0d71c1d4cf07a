"""RMS norm, scale, shift and the rounding to 8 bits of the linear layer after it, in one pass.

Apart, the normalised tokens are written at full precision, read, and written again in 8 bits; here
they are never in memory at full precision. The scale of the layer's input must be known beforehand,
as it is in files that hold `input_scale`: one taken from the tokens' own largest value would need
all of them first.

Letters: B batch, N tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiprod_core.model.transformer import modulated_norm
from aiprod_core.quantization.fp8 import FP8, FP8_MAX, to_fp8


def reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float, input_scale: Tensor) -> Tensor:
    return to_fp8(modulated_norm(x, scale, shift, eps).float() / input_scale)


def fused_adaln_fp8(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, input_scale: Tensor
) -> Tensor:
    """x (B, N, D); scale, shift (B or 1, N or 1, D); input_scale (). Returns (B, N, D), e4m3."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    scale, shift = (row.expand(batch, tokens, width) for row in (scale, shift))
    out = torch.empty_like(x, dtype=FP8)
    _adaln_fp8[(batch * tokens,)](
        x, scale, shift, input_scale, out,
        tokens, width, scale.stride(0), scale.stride(1), shift.stride(0), shift.stride(1), eps,
        LARGEST=FP8_MAX, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out


@triton.jit
def _adaln_fp8(
    x_ptr, scale_ptr, shift_ptr, input_scale_ptr, out_ptr,
    tokens, width, scale_b, scale_n, shift_b, shift_n, eps,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + b * scale_b + n * scale_n + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + b * shift_b + n * shift_n + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    y = wide * tl.rsqrt(tl.sum(wide * wide) / width + eps)
    y = y * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    y = y.to(x.dtype).to(tl.float32)  # what is rounded to 8 bits is what the layer would be given
    y = y / tl.load(input_scale_ptr)
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    tl.store(out_ptr + row * width + column, y.to(out_ptr.dtype.element_ty), mask=inside)
