"""Where sampling starts: tokens mixed with noise, conditioned tokens as far as their mask says."""

import torch
from torch import Tensor

from aiprod_core.components.samplers import NoiseSampler, gaussian
from aiprod_core.types import AV, LatentState


def add_noise(state: LatentState, noise: Tensor, noise_scale: float = 1.0) -> Tensor:
    """Noisy tokens (B, N, C) at level `noise_scale`, in float32.

    Where `denoise_mask` is below 1 they move towards `clean_latent`; at 0 they are it.
    """
    noisy = torch.lerp(state.latent.float(), noise.float(), noise_scale)
    return torch.lerp(state.clean_latent.float(), noisy, state.denoise_mask.float())


def noisy_start(
    video: LatentState | None,
    audio: LatentState | None,
    *,
    generator: torch.Generator | None = None,
    noise_scale: float = 1.0,  # the schedule's first sigma when `latent` holds an earlier result
    noise_sampler: NoiseSampler | None = None,  # default: standard normal from the generator
) -> AV:
    """The first x of a sampler. Draws video, then audio, tokens of conditions included.

    A frozen modality takes part in the draw: a seed's noise does not depend on how a sound is used.
    """
    latents = AV(
        None if video is None else video.latent.float(),
        None if audio is None else audio.latent.float(),
    )
    noise = (noise_sampler or gaussian(generator))(latents)
    return AV(
        None
        if video is None or noise.video is None
        else add_noise(video, noise.video, noise_scale),
        None
        if audio is None or noise.audio is None
        else add_noise(audio, noise.audio, noise_scale),
    )
