"""Layers that the transformer and the text connectors share. Names follow the checkpoints.

Letters: B batch, N tokens, S context tokens, D width, heads, d head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.model.attention import attention
from aiprod_core.model.rope import Rotary, rotate


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, without a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rotated_norm(
    x: Tensor, weight: Tensor, eps: float, rotary: Rotary | None, heads: int
) -> Tensor:
    """Queries or keys (B, N, heads * d), normalised over all heads together, then rotated."""
    x = F.rms_norm(x, x.shape[-1:], weight, eps)
    return x if rotary is None else rotate(x, rotary, heads)


class Attention(nn.Module):
    """Multi-head attention with q and k normalised over all heads together, then rotated.

    Queries come from x (B, N, query_width), keys and values from `context` (B, S, context_width),
    or from x. With `is_gated`, each head's output is scaled by `2 sigmoid(to_gate_logits(x))`,
    which is 1 at initialisation of the gate.
    """

    # An instance may have others instead: a kernel, or attention over several processes.
    rotated_norm = staticmethod(rotated_norm)
    attend = staticmethod(attention)

    def __init__(
        self,
        query_width: int,
        context_width: int | None = None,
        *,
        heads: int,
        head_dim: int,
        eps: float = 1e-6,
        is_gated: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        context_width = query_width if context_width is None else context_width
        self.heads = heads
        self.to_q = nn.Linear(query_width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_gate_logits = nn.Linear(query_width, heads) if is_gated else None
        self.to_out = nn.Sequential(nn.Linear(inner, query_width))

    def forward(self, x: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
        """Returns (B, N, query_width); `options` are those of `mixed`."""
        return self.to_out(self.mixed(x, context, **options))

    def mixed(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
        context_rotary: Rotary | None = None,
        keep: Tensor | bool = True,
    ) -> Tensor:
        """What all heads mix, before it is projected: (B, N, heads * d).

        `mask` is added to the scores; `context_rotary` turns the keys and is `rotary` for
        self-attention. `keep` False replaces what attention mixes by each token's own value
        (spatio-temporal guidance, needs S = N); a boolean (B, 1, 1) does so per sample.
        """
        context = x if context is None else context
        if keep is False:
            out = self.split_heads(self.to_v(context))
        else:
            context_rotary = rotary if context_rotary is None else context_rotary
            q, k, v = self.queries_keys_values(x, context, rotary, context_rotary)
            out = self.attend(q, k, v, mask)
            if isinstance(keep, Tensor):
                out = torch.where(keep[..., None], out, v)
        out = out.transpose(1, 2)  # (B, N, heads, d)
        if self.to_gate_logits is not None:
            gate = torch.sigmoid(self.to_gate_logits(x))
            out = out * (gate + gate)[..., None]
        return out.flatten(2)

    def queries_keys_values(
        self, x: Tensor, context: Tensor, rotary: Rotary | None, context_rotary: Rotary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, heads, N, d), and twice (B, heads, S, d)."""
        q = self.split_heads(self._rotated(self.to_q(x), self.q_norm, rotary))
        return q, *self.keys_values(context, context_rotary)

    def keys_values(self, context: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """What queries look up in `context` (B, S, context_width): (B, heads, S, d) each."""
        k = self._rotated(self.to_k(context), self.k_norm, rotary)
        return self.split_heads(k), self.split_heads(self.to_v(context))

    def _rotated(self, x: Tensor, norm: nn.RMSNorm, rotary: Rotary | None) -> Tensor:
        return self.rotated_norm(x, norm.weight, norm.eps, rotary, self.heads)

    def split_heads(self, x: Tensor) -> Tensor:
        # Not einops: torch.compile would trace through it, which doubles a block's compile time.
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., heads, N, d)


class FeedForward(nn.Module):
    """D -> 4 D -> D with tanh-GELU between."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        # Index 1 is where the published network has its dropout; it holds no parameters.
        self.net = nn.Sequential(
            GELULinear(width, 4 * width, bias=bias),
            nn.Identity(),
            nn.Linear(4 * width, width, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GELULinear(nn.Module):
    def __init__(self, in_width: int, out_width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, out_width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class AdaLayerNormSingle(nn.Module):
    """Noise level -> `rows` modulation vectors (PixArt-alpha, arXiv:2310.00426).

    One such network serves all blocks, each of which adds its own table.
    """

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(width)})
        self.linear = nn.Linear(width, rows * width)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """timesteps (B, N), already scaled -> modulation (B, N, rows, D), embedding (B, N, D)."""
        embedding = self.emb["timestep_embedder"](timesteps)
        modulation = self.linear(F.silu(embedding))
        return modulation.unflatten(-1, (self.rows, -1)), embedding


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, then a two-layer network. (B, N) -> (B, N, D)."""

    NUM_SINUSOIDS = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(self.NUM_SINUSOIDS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        sinusoids = timestep_sinusoids(timesteps, self.NUM_SINUSOIDS)
        return self.linear_2(F.silu(self.linear_1(sinusoids.to(self.linear_1.weight.dtype))))


def timestep_sinusoids(timesteps: Tensor, count: int) -> Tensor:
    """`[cos(t w), sin(t w)]` with w from 1 down to 1/10000 (exclusive), in float32."""
    half = count // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(steps * (-math.log(10000.0) / half))
    angles = timesteps.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
