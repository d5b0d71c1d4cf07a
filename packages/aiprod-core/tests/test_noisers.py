"""Where sampling starts."""

from dataclasses import replace

import pytest
import torch

from aiprod_core.components.noisers import add_noise, noisy_start
from aiprod_core.types import LatentState


def state(tokens: int, channels: int, mask: float = 1.0) -> LatentState:
    generator = torch.Generator().manual_seed(tokens)
    return LatentState(
        latent=torch.randn(2, tokens, channels, generator=generator),
        clean_latent=torch.randn(2, tokens, channels, generator=generator),
        denoise_mask=torch.full((2, tokens, 1), mask),
        positions=torch.zeros(2, 1, tokens, 2),
    )


def test_full_noise_forgets_the_latent_and_none_keeps_it() -> None:
    given, noise = state(5, 3), torch.randn(2, 5, 3)
    assert torch.equal(add_noise(given, noise, 1.0), noise)
    assert torch.equal(add_noise(given, noise, 0.0), given.latent)


def test_a_kept_token_starts_clean_whatever_the_noise() -> None:
    given = state(5, 3, mask=0.0)
    assert torch.equal(add_noise(given, torch.randn(2, 5, 3)), given.clean_latent)


def test_a_mask_of_a_quarter_mixes_a_quarter_of_the_noise_in() -> None:
    given, noise = state(5, 3, mask=0.25), torch.randn(2, 5, 3)
    torch.testing.assert_close(add_noise(given, noise), 0.25 * noise + 0.75 * given.clean_latent)


def test_one_generator_draws_video_and_then_audio() -> None:
    video, audio = state(5, 3), state(4, 2)
    got = noisy_start(video, audio, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(got.video, torch.randn(2, 5, 3, generator=generator))
    assert torch.equal(got.audio, torch.randn(2, 4, 2, generator=generator))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_start_is_float32_and_an_absent_modality_none(dtype: torch.dtype) -> None:
    audio = state(4, 2)
    audio = replace(audio, latent=audio.latent.to(dtype), clean_latent=audio.clean_latent.to(dtype))
    got = noisy_start(None, audio, generator=torch.Generator().manual_seed(1), noise_scale=0.5)
    assert got.video is None and got.audio.dtype == torch.float32
