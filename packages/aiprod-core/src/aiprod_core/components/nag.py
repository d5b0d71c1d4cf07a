"""Normalised attention guidance (Chen et al. 2025, arXiv:2505.21179): negative prompts without CFG.

Distilled models run in one pass, which leaves no second estimate to move away from. Here each
text attention looks at both prompts and moves its own output, Z+ with the prompt, away from Z-
with the negative one:

    Z  = Z+ + (scale - 1)(Z+ - Z-)
    Z <- Z min(1, tau |Z+|_1 / |Z|_1)          per token, over all heads
    Z <- Z+ + alpha (Z - Z+)

It costs a second text attention a block. The network does not know: both prompts come to it as one
context, and its text attentions are replaced for the length of a run.

Letters: B batch, N tokens, S text tokens, D width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiprod_core.model.layers import Attention
from aiprod_core.model.transformer import Transformer


@dataclass(frozen=True)
class NAG:
    """How one modality is guided; the defaults guide nothing."""

    scale: float = 1.0  # 1 = off; the paper's phi is scale - 1. Video models take 5 to 11
    tau: float = 2.5  # how much longer than Z+ the result may be
    alpha: float = 0.25  # share of the result

    @property
    def is_on(self) -> bool:
        return self.scale != 1


OFF = NAG()


def normalised_guidance(positive: Tensor, negative: Tensor, nag: NAG) -> Tensor:
    """The three lines above, on attention outputs (B, N, D)."""
    guided = positive + (positive - negative) * (nag.scale - 1)
    length, limit = (
        z.float().abs().sum(dim=-1, keepdim=True) for z in (guided, positive)
    )  # (B, N, 1)
    shrink = (nag.tau * limit / length.clamp(min=1e-12)).clamp(max=1)
    guided = guided * shrink.to(guided.dtype)
    return positive + (guided - positive) * nag.alpha


def both_prompts(context: Tensor, negative_context: Tensor) -> Tensor:
    """The context (B, 2 S, D) that a guided text attention expects."""
    return torch.cat((context, negative_context), dim=1)


@contextmanager
def guided_text_attention(
    transformer: Transformer, *, video: NAG = OFF, audio: NAG = OFF
) -> Iterator[None]:
    """Within it, a modality that is guided takes `both_prompts` for its context."""
    with ExitStack() as stack:
        for block in transformer.transformer_blocks:
            for name, nag in (("attn2", video), ("audio_attn2", audio)):
                if nag.is_on and hasattr(block, name):
                    stack.enter_context(_guided(getattr(block, name), nag))
        yield


@contextmanager
def _guided(attention: Attention, nag: NAG) -> Iterator[None]:
    def forward(
        x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        assert context is not None
        contexts = context.chunk(2, dim=1)
        masks = (None, None) if mask is None else mask.chunk(2, dim=-1)
        positive, negative = (
            attention.mixed(x, context, mask=mask, **options)
            for context, mask in zip(contexts, masks, strict=True)
        )
        return attention.to_out(normalised_guidance(positive, negative, nag))

    attention.forward = forward  # the instance's, which hides the class's
    try:
        yield
    finally:
        del attention.forward
