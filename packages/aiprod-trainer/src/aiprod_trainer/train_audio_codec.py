"""Trains an audio VAE of the LTX-2 classes on the procedural world's sound.

    python -m aiprod_trainer.train_audio_codec configs/nano/audio_codec.yaml --out runs/audio_codec

The codec compresses a stereo log-mel spectrogram 4x in time and in frequency. The loss is the mean
absolute error of the log-mel, the same for its differences in time (onsets are what must survive),
and a small KL term.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.mel import log_mel
from aiprod_trainer.config import Section, run_script
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.run import Run, averaged_copy, update_average
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import synthesise


class AudioCodecConfig(Section):
    audio_vae: dict[str, Any]  # the checkpoint's "audio_vae" section, published keys
    world: str = "v1"
    batch_size: int = 8
    crop_frames: int = 105  # mel frames of a training crop, 4k+1
    steps: int = 2000
    warmup_steps: int = 50
    muon_lr: float = 1.5e-3
    adamw_lr: float = 1.5e-3
    max_grad_norm: float = 1.0
    onset_weight: float = 1.0
    kl_weight: float = 1e-3
    ema_decay: float = 0.998
    seed: int = 0
    eval_every: int = 200
    save_every_s: float = 180.0


class AudioVAE(nn.Module):
    """Both halves, so that one state dict holds the codec."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config)
        self.decoder = AudioDecoder(config)


def train(config: AudioCodecConfig, folder: Path) -> AudioVAE:
    """Runs the training to its end and returns the averaged model."""
    torch.manual_seed(config.seed)
    vae = AudioVAE(AudioVAEConfig.from_metadata(config.audio_vae))
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.conv.weight"):  # residual blocks start as the identity
            nn.init.zeros_(parameter)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = averaged_copy(vae)
    optimizers = muon_and_adamw(vae, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    run = Run(
        folder,
        {"model": vae, "average": average, **optimizers},
        config,
        total_steps=config.steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
    )
    held_out = mel_clips(config, vae.config, np.random.default_rng([config.seed, 2**31]), 32)
    for step in run.steps():
        mel = mel_clips(config, vae.config, run.numpy_generator(step), config.batch_size)
        set_learning_rate(
            optimizers.values(), warmup_then_linear_decay(step, config.steps, config.warmup_steps)
        )
        mean, logvar = vae.encoder.moments(mel)
        noise = torch.randn(mean.shape, generator=run.generator(step))
        error = vae.decoder(mean + noise * (0.5 * logvar).exp()) - mel
        reconstruction = error.abs().mean() + config.onset_weight * error.diff(dim=2).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction + config.kl_weight * kl
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), config.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        update_average(average, vae, step, config.ema_decay)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            with torch.no_grad():
                held_error = average.decoder(average.encoder.moments(held_out)[0]) - held_out
            run.log(loss=loss.item(), kl=kl.item(), held_mel_l1=held_error.abs().mean().item())
        elif step % 20 == 0:
            run.log(loss=loss.item(), kl=kl.item())
    return average  # type: ignore[return-value]


def mel_clips(
    config: AudioCodecConfig, vae_config: AudioVAEConfig, rng: np.random.Generator, count: int
) -> Tensor:
    """Log-mel crops (count, 2, crop_frames, bins) of the world's sounds."""
    waveforms = [synthesise(sample_scene(rng, world=config.world)) for _ in range(count)]
    mel = log_mel(torch.from_numpy(np.stack(waveforms)), vae_config)
    starts = rng.integers(0, mel.shape[2] - config.crop_frames + 1, count)
    return torch.stack([m[:, s : s + config.crop_frames] for m, s in zip(mel, starts, strict=True)])


if __name__ == "__main__":
    run_script(__doc__, AudioCodecConfig, train)
