"""How long a clip should be, from its prompt (2.5).

A few learned queries attend over the text contexts of both modalities; a small network turns what
they gather into the logarithm of a duration.

Letters: B texts, S context tokens, D width of the head, Q queries.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError

MIN_DURATION_S = 1.0
MAX_DURATION_S = 20.0


@dataclass(frozen=True)
class DurationHeadConfig:
    """`video_width` and `audio_width` are those of the contexts."""

    num_queries: int
    mlp_width: int
    width: int = 256
    heads: int = 4
    video_width: int = 4096
    audio_width: int = 2048

    @classmethod
    def from_metadata(
        cls, config: Mapping[str, Any], transformer: Mapping[str, Any]
    ) -> "DurationHeadConfig":
        """Reads the sections `duration_head` and `transformer`. Raises CheckpointError."""
        for key in ("num_queries", "mlp_hidden"):
            if key not in config:
                raise CheckpointError(f"config: duration_head has no {key}")
        width, heads = config.get("pooler_hidden_dim", 256), config.get("num_pooler_heads", 4)
        if width % heads:
            raise CheckpointError(
                f"config: duration_head num_pooler_heads is {heads}, which does not divide "
                f"pooler_hidden_dim {width}"
            )
        return cls(
            num_queries=config["num_queries"],
            mlp_width=config["mlp_hidden"],
            width=width,
            heads=heads,
            video_width=transformer.get("cross_attention_dim", 4096),
            audio_width=transformer.get("audio_cross_attention_dim", 2048),
        )


class DurationHead(nn.Module):
    """Text contexts -> seconds."""

    def __init__(self, config: DurationHeadConfig) -> None:
        super().__init__()
        self.video_input_proj = nn.Linear(config.video_width, config.width)
        self.audio_input_proj = nn.Linear(config.audio_width, config.width)
        self.video_modality_emb = nn.Parameter(0.02 * torch.randn(config.width))
        self.audio_modality_emb = nn.Parameter(0.02 * torch.randn(config.width))
        self.attention_pooler = AttentionPooler(config)
        self.mlp_hidden = nn.Linear(config.num_queries * config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, 1)

    def forward(self, video_context: Tensor | None, audio_context: Tensor | None) -> Tensor:
        """Contexts (B, S, width) of either or both modalities -> seconds (B,), not clamped."""
        tokens: list[Tensor] = []
        if video_context is not None:
            tokens.append(self.video_input_proj(video_context) + self.video_modality_emb)
        if audio_context is not None:
            tokens.append(self.audio_input_proj(audio_context) + self.audio_modality_emb)
        if not tokens:
            raise InputError("a duration needs the context of one modality at least")
        pooled = self.attention_pooler(torch.cat(tokens, dim=1)).flatten(1)  # (B, Q * D)
        hidden = F.gelu(self.mlp_hidden(pooled), approximate="tanh")
        return self.mlp_out(hidden).squeeze(-1).exp()


class AttentionPooler(nn.Module):
    """Learned queries attend over the tokens: (B, S, D) -> (B, Q, D)."""

    def __init__(self, config: DurationHeadConfig) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(0.02 * torch.randn(config.num_queries, config.width))
        # PyTorch's own module, whose fused in-projection is what the checkpoint holds.
        self.cross_attn = nn.MultiheadAttention(config.width, config.heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(x), -1, -1)
        return self.cross_attn(queries, x, x, need_weights=False)[0]


def frames_for_duration(
    seconds: float,
    fps: float,
    time_scale: int = 8,
    *,
    min_s: float = MIN_DURATION_S,
    max_s: float = MAX_DURATION_S,
) -> int:
    """The longest clip of `time_scale` k + 1 frames within `seconds`, which is clamped first.

    A clip that would come out shorter than `min_s` gets the next length up.
    """
    frames = min(max(seconds, min_s), max_s) * fps
    steps = max(0, math.floor((frames - 1) / time_scale))
    if steps * time_scale + 1 < min_s * fps:
        steps += 1
    return steps * time_scale + 1
