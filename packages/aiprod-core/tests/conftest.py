"""A tiny joint transformer and inputs for it, shared by several test files."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whomever

from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.types import Modality

TINY_2_0 = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    in_channels=6,
    out_channels=6,
    audio_in_channels=4,
    audio_out_channels=4,
    num_layers=2,
    cross_attention_dim=32,
    audio_cross_attention_dim=16,
    av_ca_timestep_scale_multiplier=1000,
    frequencies_precision="float64",
    caption_channels=12,
)
TINY_2_3 = replace(
    TINY_2_0, caption_channels=None, apply_gated_attention=True, cross_attention_adaln=True
)


@pytest.fixture(params=["2.0", "2.3"])
def tiny_config(request: pytest.FixtureRequest) -> TransformerConfig:
    return TINY_2_0 if request.param == "2.0" else TINY_2_3


@pytest.fixture
def randomised() -> Callable[[TransformerConfig], Transformer]:
    """Builds a transformer in which every parameter has a random value, so that no term hides."""

    def build(config: TransformerConfig) -> Transformer:
        generator = torch.Generator().manual_seed(7)
        transformer = Transformer(config).requires_grad_(False)
        for parameter in transformer.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 4
            parameter.normal_(std=fan_in**-0.5, generator=generator)
        return transformer.eval()

    return build


@pytest.fixture
def modalities() -> Callable[..., tuple[Modality, Modality]]:
    """Builds a video of 2 x 2 x 3 tokens and a sound of 5, in a batch of 2."""

    def build(config: TransformerConfig, seed: int = 0) -> tuple[Modality, Modality]:
        generator = torch.Generator().manual_seed(seed)

        def one(tokens: int, axes: int, channels: int, width: int, extent: float) -> Modality:
            start = torch.rand(2, axes, tokens, 1, generator=generator) * extent
            sigma = torch.rand(2, generator=generator)
            return Modality(
                latent=torch.randn(2, tokens, channels, generator=generator),
                sigma=sigma,
                timesteps=sigma[:, None, None].expand(2, tokens, 1),
                positions=torch.cat((start, start + 1), dim=-1),
                context=torch.randn(2, 4, config.caption_channels or width, generator=generator),
            )

        return (
            one(12, 3, config.in_channels, config.width, 15.0),
            one(5, 1, config.audio_in_channels, config.audio_width, 15.0),
        )

    return build
