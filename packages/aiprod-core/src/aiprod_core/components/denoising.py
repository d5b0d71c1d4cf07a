"""One stage of a run, from noise to clean tokens: noiser, guided denoiser and sampler together."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from aiprod_core.components.conditioning import keep_conditions
from aiprod_core.components.guiders import GuidedDenoiser, GuidedModality, Model
from aiprod_core.components.noisers import noisy_start
from aiprod_core.components.samplers import Blend, Callback, Denoise, NoiseSampler, ignore_step
from aiprod_core.components.samplers import euler as default_sampler
from aiprod_core.components.step_cache import CachePolicy, StepCache
from aiprod_core.errors import is_out_of_memory
from aiprod_core.types import AV


class Sampler(Protocol):
    """A sampler with its own settings and generator already bound, as by `functools.partial`."""

    def __call__(
        self, denoise: Denoise, x: AV, sigmas: Tensor, *, blend: Blend, callback: Callback
    ) -> AV: ...


def denoise(
    transformer: Model,
    sigmas: Tensor,
    video: GuidedModality | None,
    audio: GuidedModality | None,
    *,
    sampler: Sampler = default_sampler,
    generator: torch.Generator | None = None,  # of the first noise; a sampler brings its own
    noise_sampler: NoiseSampler | None = None,  # draws the first noise instead
    max_batch_size: int | None = None,
    min_cosine: float = 1.0,  # adaptive guidance; see `GuidedDenoiser`
    cache_policy: CachePolicy | None = None,  # of steps; None computes them all
    lighten: Callable[[GuidedDenoiser], bool] | None = None,
    callback: Callback = ignore_step,
) -> AV:
    """Clean tokens of each modality, appended conditions included, in float32.

    Where memory runs out in a call of the model, `lighten` may make the next attempt smaller, and
    the run goes on from there; False says that it cannot.

    Starts from the states' latents noised to `sigmas[0]`: pure noise in a first stage, the earlier
    result under some noise in a second.
    """
    video_state = None if video is None else video.state
    audio_state = None if audio is None else audio.state
    x = noisy_start(
        video_state,
        audio_state,
        generator=generator,
        noise_scale=float(sigmas[0]),
        noise_sampler=noise_sampler,
    )
    guided = GuidedDenoiser(
        transformer, sigmas, video, audio, max_batch_size=max_batch_size, min_cosine=min_cosine
    )
    denoiser: Denoise = guided
    if lighten is not None:
        denoiser = retried(guided, partial(lighten, guided))
    if cache_policy is not None:
        denoiser = StepCache(denoiser, sigmas, cache_policy)
    blend = keep_conditions(video_state, audio_state)
    return sampler(denoiser, x, sigmas, blend=blend, callback=callback)


def retried(denoise: Denoise, lighten: Callable[[], bool]) -> Denoise:
    """`denoise` that is tried again after running out of memory, as long as `lighten` helps."""

    def attempt(x: AV, sigma: float) -> AV:
        while True:
            try:
                return denoise(x, sigma)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not lighten():
                    raise
            # Here, where the error and what its frames hold are gone.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return attempt
