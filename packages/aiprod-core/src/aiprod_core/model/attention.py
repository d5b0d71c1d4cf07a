"""Scaled dot-product attention: one function, whichever kernel the machine has.

PyTorch's own kernel is the reference. FlashAttention 3 (Hopper, half precision) and xFormers are
used where they are installed and can compute the same thing; neither sees a call with a mask, since
they want aligned or structured masks. The choice is made once per kind of call and then remembered.

Letters: B batch, N query tokens, S key tokens, heads, d head width.
"""

import importlib
import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
XFORMERS_DTYPES = (*HALF, torch.float32)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(d) + mask) v`.

    q (B, heads, N, d); k, v (B, heads, S, d); mask, added to the scores, broadcastable to
    (B, heads, N, S). Returns (B, heads, N, d).
    """
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # PyTorch's backward on a CPU takes twice as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            mask = None if mask is None else mask.float()
            wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        return wide.to(torch.get_autocast_dtype("cpu"))
    backend = pick_backend(q.device, q.dtype, mask is not None)
    if backend == "flash3":
        return flash3_attention(q, k, v)
    if backend == "xformers":
        return xformers_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.compiler.assume_constant_result
def pick_backend(device: torch.device, dtype: torch.dtype, has_mask: bool) -> str:
    """The kernel for calls of this kind: "flash3", "xformers" or "sdpa".

    Compiled graphs take the answer as a constant instead of tracing the look-up.
    """
    return _probe(device, dtype, has_mask)


@cache
def _probe(device: torch.device, dtype: torch.dtype, has_mask: bool) -> str:
    if device.type != "cuda" or has_mask:
        return "sdpa"
    capability = torch.cuda.get_device_capability(device)
    if dtype in HALF and capability[0] == 9 and importlib.util.find_spec("flash_attn_interface"):
        return "flash3"
    # From Hopper on PyTorch's kernel (cuDNN) is at least as fast, so xFormers serves older cards.
    if dtype in XFORMERS_DTYPES and capability[0] < 9 and importlib.util.find_spec("xformers"):
        return "xformers"
    return "sdpa"


def flash3_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kernel = importlib.import_module("flash_attn_interface").flash_attn_func
    out = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, N, heads, d)
    # Releases differ in whether the log-sum-exp comes along.
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kernel = importlib.import_module("xformers.ops").memory_efficient_attention
    return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
