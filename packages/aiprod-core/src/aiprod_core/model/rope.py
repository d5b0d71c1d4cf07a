"""Rotary position embedding over any number of axes (RoFormer, arXiv:2104.09864; LTX-2's layout).

Every axis shares one geometric ladder of frequencies, from a quarter turn over the axis to `theta`
times that, so a position counts as a fraction of the axis' maximum. The angles fill half the width
with the axes interleaved; what is left over stays unrotated, at the front. Two pairings exist:
"split" turns element i of a head with element i + d/2, "interleaved" turns neighbours.

Letters: B batch, N tokens, D width over all heads, d head width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines (B, N, D / 2), and which elements form pairs."""

    cos: Tensor
    sin: Tensor
    is_interleaved: bool = False


def rotary_table(
    positions: Tensor,
    max_positions: tuple[int, ...],
    width: int,
    *,
    theta: float = 10000.0,
    is_interleaved: bool = False,
    in_float64: bool = False,
) -> Rotary:
    """The table for tokens at `positions` (B, axes, N), in the unit of `max_positions`.

    `width` is D; `in_float64` computes the frequencies (not the angles) in double precision, as
    newer checkpoints were trained.
    """
    axes = len(max_positions)
    if positions.shape[1] != axes:
        raise ValueError(f"positions have {positions.shape[1]} axes; max_positions names {axes}")
    frequencies = rotary_frequencies(
        width // (2 * axes), theta, torch.float64 if in_float64 else torch.float32, positions.device
    )
    limits = torch.tensor(max_positions, dtype=torch.float32, device=positions.device)
    fractions = positions.float().transpose(1, 2) / limits  # (B, N, axes)
    angles = frequencies[:, None] * (2 * fractions - 1)[:, :, None, :]  # (B, N, frequencies, axes)
    angles = angles.flatten(2)
    angles = F.pad(angles, (width // 2 - angles.shape[-1], 0))  # angle 0: not rotated
    return Rotary(angles.cos(), angles.sin(), is_interleaved)


def rotary_frequencies(
    count: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`(pi / 2) theta^(j / (count - 1))` for j = 0 .. count - 1, as float32."""
    exponents = torch.linspace(0, 1, count, dtype=dtype, device=device)
    return (theta**exponents * (math.pi / 2)).float()


def rotate(x: Tensor, rotary: Rotary, heads: int) -> Tensor:
    """Turns the pairs of x (..., N, D) by their angles, in the table's precision."""
    if rotary.is_interleaved:
        cos, sin = rotary.cos, rotary.sin
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # (..., N, D / 2)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.flatten(-2).to(x.dtype)
    cos, sin = (table.unflatten(-1, (heads, 1, -1)) for table in rotary[:2])  # (.., heads, 1, d/2)
    pairs = x.unflatten(-1, (heads, 2, -1))  # (..., N, heads, 2, d / 2)
    turned = pairs * cos
    # In place, which saves two passes over x and the one that would put the halves together.
    turned[..., :1, :].addcmul_(pairs[..., 1:, :], sin, value=-1)
    turned[..., 1:, :].addcmul_(pairs[..., :1, :], sin)
    return turned.flatten(-3).to(x.dtype)
