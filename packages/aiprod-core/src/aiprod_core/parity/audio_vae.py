"""Golden cases of the audio front end and autoencoder."""

from typing import Any

from torch import Tensor

from aiprod_core.loader.networks import load_audio_decoder, load_audio_encoder
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.mel import log_mel, resample
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Any]:
    """Waveforms to mels where the case has no checkpoint, else mels to latents and back."""
    return _codec(case) if case.description.get("checkpoint") else _front_end(case)


def sampling_rate(key: str) -> int:
    """The rate in the name of a waveform: 16000 of "in.wave_16k" and of "in.wave_16000"."""
    text = key.rpartition("_")[2]
    return int(text[:-1]) * 1000 if text.endswith("k") else int(text)


def _front_end(case: Case) -> dict[str, Any]:
    """`in.wave_16k` is at the front end's own rate; `in.wave_RATE` is resampled to it first."""
    params = case.params
    config = AudioVAEConfig(
        sampling_rate=params["sample_rate"],
        n_fft=params["n_fft"],
        hop_length=params["hop"],
        mel_bins=params["mel_bins"],
    )
    out: dict[str, Tensor] = {}
    for key, waveform in case.tensors.items():
        if not key.startswith("in.wave_"):
            continue
        if sampling_rate(key) == config.sampling_rate:
            out["out.logmel"] = log_mel(waveform, config)
        else:
            rate = key.removeprefix("in.wave_")
            resampled = resample(waveform, sampling_rate(key), config.sampling_rate)
            out[f"out.resampled_{rate}"] = resampled
            out[f"out.logmel_{rate}"] = log_mel(resampled, config)
    return out


def _codec(case: Case) -> dict[str, Any]:
    """`in.mel_X` gives `out.latent_X`; `in.latent...` gives `out.mel...`."""
    encoder = load_audio_encoder(case.checkpoint)
    decoder = load_audio_decoder(case.checkpoint)
    out: dict[str, Tensor] = {}
    for key, value in case.tensors.items():
        if key.startswith("in.mel"):
            out["out.latent" + key[len("in.mel") :]] = encoder(value)
        elif key.startswith("in.latent"):
            out["out.mel" + key[len("in.latent") :]] = decoder(value)
    return out
