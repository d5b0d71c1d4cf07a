"""Bias and tanh-GELU in one pass over what a matrix product has just written, in its place."""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def reference(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def fused_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., D), contiguous, is overwritten and returned; bias (D,)."""
    width = x.shape[-1]
    _gelu[(triton.cdiv(x.numel(), BLOCK),)](
        x, x if bias is None else bias, x.numel(), width, HAS_BIAS=bias is not None, BLOCK=BLOCK
    )
    return x


@triton.jit
def _gelu(x_ptr, bias_ptr, count, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + place % width, mask=inside, other=0.0).to(tl.float32)
    # 0.5 x (1 + tanh u) = x sigmoid(2 u), with u as in Hendrycks & Gimpel, arXiv:1606.08415
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x / (1.0 + tl.exp(-2.0 * u))
    tl.store(x_ptr + place, y.to(x_ptr.dtype.element_ty), mask=inside)
