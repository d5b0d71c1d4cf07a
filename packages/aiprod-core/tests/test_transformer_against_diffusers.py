"""The transformer against an independent implementation, with the same random weights.

All tokens of a sample share one sigma and both modalities have the same one: where these differ,
`diffusers` feeds the modulation between the modalities other inputs than published checkpoints
were trained with.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_core.model.transformer import Perturbations, Transformer, TransformerConfig
from aiprod_core.parity.diffusers_peers import transformer_arguments, transformer_name
from aiprod_core.types import Modality

pytest.importorskip("diffusers")
from diffusers import LTX2VideoTransformer3DModel

Inputs = Callable[..., tuple[Modality, Modality]]


def renamed(theirs: nn.Module) -> dict[str, Tensor]:
    return {transformer_name(name): tensor for name, tensor in theirs.state_dict().items()}


def pair(config: TransformerConfig) -> tuple[Transformer, nn.Module]:
    """Both networks with the same weights, none of them zero."""
    generator = torch.Generator().manual_seed(3)
    theirs = (
        LTX2VideoTransformer3DModel(**transformer_arguments(config)).requires_grad_(False).eval()
    )
    for parameter in theirs.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim == 2 else 4
        parameter.normal_(std=fan_in**-0.5, generator=generator)
    ours = Transformer(config).requires_grad_(False).eval()
    ours.load_state_dict(renamed(theirs))
    return ours, theirs


def one_sigma(modalities: tuple[Modality, Modality]) -> tuple[Modality, Modality]:
    sigma = torch.tensor([0.7, 0.3])
    video, audio = (
        replace(m, sigma=sigma, timesteps=sigma[:, None, None].expand_as(m.timesteps))
        for m in modalities
    )
    return video, audio


def call_theirs(
    theirs: nn.Module, video: Modality, audio: Modality, **options: Any
) -> tuple[Tensor, Tensor]:
    return theirs(
        hidden_states=video.latent,
        audio_hidden_states=audio.latent,
        encoder_hidden_states=video.context,
        audio_encoder_hidden_states=audio.context,
        encoder_attention_mask=video.context_mask,
        audio_encoder_attention_mask=audio.context_mask,
        timestep=video.timesteps.squeeze(-1) * 1000,
        audio_timestep=audio.timesteps.squeeze(-1) * 1000,
        sigma=video.sigma * 1000,
        audio_sigma=audio.sigma * 1000,
        video_coords=video.positions,
        audio_coords=audio.positions,
        return_dict=False,
        **options,
    )


def assert_agree(got: tuple[Any, Any], want: tuple[Tensor, Tensor]) -> None:
    """Up to rounding in float32 over a few layers."""
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_type": "interleaved", "frequencies_precision": None},
        {"av_ca_timestep_scale_multiplier": 1},
        {"positional_embedding_max_pos": (7, 30, 50), "audio_positional_embedding_max_pos": (9,)},
    ],
)
def test_both_generations_agree(
    tiny_config: TransformerConfig, modalities: Inputs, changes: dict[str, Any]
):
    config = replace(tiny_config, **changes)
    ours, theirs = pair(config)
    video, audio = one_sigma(modalities(config))
    assert_agree(ours(video, audio), call_theirs(theirs, video, audio))


def test_later_options_agree(tiny_config: TransformerConfig, modalities: Inputs):
    config = replace(
        tiny_config,
        ff_bias=False,
        use_prompt_adaln_single=False,
        use_keyframes_abs_pos_embedding=True,
    )
    ours, theirs = pair(config)
    video, audio = one_sigma(modalities(config))
    marker = (torch.arange(12) % 3 == 0).float()[None, :, None].expand(2, -1, -1)
    want = call_theirs(theirs, video, audio, video_keyframes_mask=marker)
    assert_agree(ours(replace(video, keyframe_marker=marker), audio), want)


def test_text_masks_agree(tiny_config: TransformerConfig, modalities: Inputs):
    ours, theirs = pair(tiny_config)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    video, audio = (replace(m, context_mask=mask) for m in one_sigma(modalities(tiny_config)))
    assert_agree(ours(video, audio), call_theirs(theirs, video, audio))


def test_perturbed_and_isolated_calls_agree(tiny_config: TransformerConfig, modalities: Inputs):
    ours, theirs = pair(tiny_config)
    video, audio = one_sigma(modalities(tiny_config))
    isolated = {"SKIP_A2V_CROSS_ATTN": None, "SKIP_V2A_CROSS_ATTN": None}
    assert_agree(
        ours(video, audio, Perturbations((isolated, isolated))),
        call_theirs(theirs, video, audio, isolate_modalities=True),
    )
    skipped = {"SKIP_VIDEO_SELF_ATTN": (1,), "SKIP_AUDIO_SELF_ATTN": (1,)}
    assert_agree(
        ours(video, audio, Perturbations(({}, skipped))),
        call_theirs(
            theirs,
            video,
            audio,
            spatio_temporal_guidance_blocks=[1],
            perturbation_mask=torch.tensor([1.0, 0.0]),
        ),
    )
