"""The way into the audio autoencoder: resample a waveform, take its log-mel spectrogram.

Both are plain functions and differentiable, so the mel also serves as a training loss.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.model.audio_vae import AudioVAEConfig

LOG_FLOOR = 1e-5


def log_mel(waveform: Tensor, config: AudioVAEConfig) -> Tensor:
    """Waveform (B, channels, samples) at `config.sampling_rate` to ln mel (B, channels, t, bins).

    Magnitude spectrum, periodic Hann window, centred frames with reflect padding, so
    t = samples // hop + 1. Computed in float32. Raises InputError for less than half a window.
    """
    batch, _, samples = waveform.shape
    if samples <= config.n_fft // 2:
        raise InputError(
            f"the sound has {samples} samples; the mel front end needs at least "
            f"{config.n_fft // 2 + 1} ({(config.n_fft // 2 + 1) / config.sampling_rate:.3f} s)"
        )
    spectrum = torch.stft(
        rearrange(waveform.float(), "b c samples -> (b c) samples"),
        config.n_fft,
        config.hop_length,
        window=torch.hann_window(config.n_fft, device=waveform.device),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )  # (B C, n_fft / 2 + 1, t)
    filters = mel_filterbank(config.sampling_rate, config.n_fft, config.mel_bins)
    mel = filters.to(waveform.device) @ spectrum.abs()
    return rearrange(mel.clamp(min=LOG_FLOOR).log(), "(b c) bins t -> b c t bins", b=batch)


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Changes the rate of (..., samples) with a windowed sinc.

    Hann window, 6 zero crossings, roll-off 0.99. The result has ceil(samples x to / from) samples.
    A polyphase filter: one kernel for each of the `to` phases (rates divided by their common
    factor), moved `from` samples at a time. Raises InputError for rates whose common factor is so
    small that the kernels would fill the memory.
    """
    if from_hz == to_hz:
        return waveform
    if from_hz <= 0 or to_hz <= 0:
        raise InputError(f"sample rates must be positive; got {from_hz} and {to_hz}")
    common = math.gcd(from_hz, to_hz)
    step, phases = from_hz // common, to_hz // common
    if step * phases > 50_000_000:
        raise InputError(
            f"cannot resample {from_hz} Hz to {to_hz} Hz: the rates have too small a common factor "
            f"({common}); resample the sound to 48000 Hz first"
        )
    kernels = _polyphase_kernels(step, phases).to(waveform.device)  # (phases, 1, taps)
    width = (kernels.shape[2] - step) // 2
    samples = waveform.shape[-1]
    x = waveform.float().reshape(-1, 1, samples)
    x = F.conv1d(F.pad(x, (width, width + step)), kernels, stride=step)
    x = rearrange(x, "b phases steps -> b (steps phases)")
    x = x[:, : math.ceil(samples * phases / step)]
    return x.reshape(*waveform.shape[:-1], -1).to(waveform.dtype)


@lru_cache(maxsize=8)
def mel_filterbank(sampling_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """Triangular filters (num_mels, n_fft / 2 + 1), equal area, on Slaney's mel scale.

    They reach from 0 Hz to half the sampling rate. Slaney, Auditory Toolbox, 1998. On the CPU,
    float32; shared between callers, so do not write to it.
    """
    with torch.device("cpu"), torch.inference_mode(False):  # kept, and used in training too
        frequencies = torch.linspace(0, sampling_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
        top = _hz_to_mel(sampling_rate / 2)
        edges = _mel_to_hz(torch.linspace(0, top, num_mels + 2, dtype=torch.float64))
        lower, centre, upper = (edges[i : i + num_mels, None] for i in range(3))
        rising = (frequencies - lower) / (centre - lower)
        falling = (upper - frequencies) / (upper - centre)
        triangles = torch.minimum(rising, falling).clamp(min=0)
        return (triangles * 2 / (upper - lower)).float()


# Slaney's scale: linear up to 1000 Hz, which is mel 15, then 27 steps per factor of 6.4.
_HZ_PER_MEL = 200 / 3
_LOG_STEP = math.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    return hz / _HZ_PER_MEL if hz < 1000 else 15 + math.log(hz / 1000) / _LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * _HZ_PER_MEL, 1000 * torch.exp((mel - 15) * _LOG_STEP))


@lru_cache(maxsize=8)
def _polyphase_kernels(step: int, phases: int) -> Tensor:
    zero_crossings, rolloff = 6, 0.99
    with torch.device("cpu"), torch.inference_mode(False):  # kept, and used in training too
        cutoff = min(step, phases) * rolloff
        width = math.ceil(zero_crossings * step / cutoff)
        taps = torch.arange(-width, width + step, dtype=torch.float64) / step
        offsets = torch.arange(phases, dtype=torch.float64) / phases
        t = ((taps - offsets[:, None]) * cutoff).clamp(-zero_crossings, zero_crossings)
        window = torch.cos(t * math.pi / zero_crossings / 2).square()
        return (torch.sinc(t) * window * (cutoff / step)).float()[:, None]
