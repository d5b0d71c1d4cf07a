"""Golden cases of the vocoders: mel to waveform, and both ways between waveform and latent."""

from typing import Any

import torch
from torch import Tensor

from aiprod_core.loader.networks import load_audio_decoder, load_audio_encoder, load_vocoder
from aiprod_core.model.mel import log_mel, resample
from aiprod_core.model.vocoder import Vocoder, upsample_hann
from aiprod_core.parity.audio_vae import sampling_rate
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Any]:
    vocoder = load_vocoder(case.checkpoint)
    out: dict[str, Any] = {"params.sampling_rate": vocoder.output_sample_rate}
    mel = case.optional_input("mel")
    if mel is not None:
        out["out.waveform"] = vocoder(mel)
        if vocoder.config.bwe:
            out |= _extension(vocoder, mel)
    latent = case.optional_input("latent")
    if latent is not None:
        decoded_mel = load_audio_decoder(case.checkpoint)(latent)
        out["mid.decoded_mel"] = decoded_mel
        out["out.decoded_waveform"] = vocoder(decoded_mel).squeeze(0)
    for key, waveform in case.tensors.items():
        if key.startswith("in.wave_"):
            encoder = load_audio_encoder(case.checkpoint)
            waveform = resample(waveform, sampling_rate(key), encoder.config.sampling_rate)
            out["out.encoded"] = encoder(log_mel(waveform, encoder.config))
    return out


def _extension(vocoder: Vocoder, mel: Tensor) -> dict[str, Tensor]:
    """Values on the way through a vocoder with bandwidth extension."""
    assert vocoder.config.bwe is not None
    low_rate = vocoder.vocoder(mel)
    bwe_mel = vocoder.mel_stft(low_rate)
    activation = vocoder.vocoder.act_post
    ramp = torch.linspace(-2, 2, 20).expand(1, vocoder.vocoder.conv_post.in_channels, -1)
    return {
        "mid.low_rate": low_rate,
        "mid.bwe_mel": bwe_mel.transpose(2, 3),  # (B, 2, num_mels, frames)
        "mid.residual": vocoder.bwe_generator(bwe_mel),
        "mid.skip": upsample_hann(low_rate, vocoder.config.bwe.ratio),
        "mid.snake_act": activation(ramp),
    }
