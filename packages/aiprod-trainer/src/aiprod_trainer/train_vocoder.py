"""Trains a vocoder of the LTX-2 classes: log-mel spectrograms to waveforms of the world's sound.

    python -m aiprod_trainer.train_vocoder configs/nano/vocoder.yaml --out runs/vocoder

The loss compares magnitudes of short-time Fourier transforms at several resolutions (Yamamoto et
al., 2020) and the log-mel itself. A quiet vocoder is the usual failure of such losses: where the
phase cannot be known, less sound is nearer to the wanted one in every bin. A term on the power in
wide bands and long windows, which does not depend on phase, holds the level.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_vocoder
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.mel import log_mel
from aiprod_core.model.vocoder import Vocoder, VocoderConfig
from aiprod_trainer.config import Section, run_script
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.run import Run, averaged_copy, update_average
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import synthesise

# Pure tones, which are hardest to learn.
RINGING: tuple[dict[str, str], ...] = (
    {"motion": "bounce", "material": "metal"},
    {"motion": "bounce", "material": "glass"},
    {"motion": "pulse"},
)


class VocoderTrainingConfig(Section):
    vocoder: dict[str, Any]  # the checkpoint's "vocoder" section, published keys
    audio_vae: dict[str, Any]  # gives the mel front end
    start: Path | None = None  # checkpoint whose vocoder is trained on
    worlds: tuple[str, ...] = ("v1",)  # each crop is of one of them
    batch_size: int = 8
    crop_frames: int = 64  # mel frames of a training crop
    ringing_share: float = 0.6  # of the crops hold one of RINGING
    steps: int = 2000
    warmup_steps: int = 50
    muon_lr: float = 1e-3
    adamw_lr: float = 3e-4
    max_grad_norm: float = 1.0
    mel_weight: float = 1.0
    level_weight: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"  # of convolutions; weights are float32
    ema_decay: float = 0.998
    seed: int = 0
    eval_every: int = 200
    save_every_s: float = 180.0


def train(config: VocoderTrainingConfig, folder: Path) -> Vocoder:
    """Runs the training to its end and returns the averaged model."""
    torch.manual_seed(config.seed)
    vocoder = Vocoder(VocoderConfig.from_metadata(config.vocoder))
    if config.start is not None:
        before = load_vocoder(open_checkpoint(config.start), dtype=torch.float32)
        vocoder.load_state_dict(before.state_dict())
    front_end = AudioVAEConfig.from_metadata(config.audio_vae)
    average = averaged_copy(vocoder)
    optimizers = muon_and_adamw(vocoder, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    run = Run(
        folder,
        {"model": vocoder, "average": average, **optimizers},
        config,
        total_steps=config.steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
    )
    held_out = crops(config, front_end, np.random.default_rng([config.seed, 2**31]), 32, 0.0)
    for step in run.steps():
        mel, waveform = crops(
            config,
            front_end,
            run.numpy_generator(step),
            config.batch_size,
            config.ringing_share,
        )
        set_learning_rate(
            optimizers.values(), warmup_then_linear_decay(step, config.steps, config.warmup_steps)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            made = vocoder(mel)
        made = made.float()
        loss = (
            spectral_loss(made, waveform)
            + config.mel_weight * mel_loss(made, mel, front_end)
            + config.level_weight * level_loss(made, waveform)
        )
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vocoder.parameters(), config.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        update_average(average, vocoder, step, config.ema_decay)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            run.log(loss=loss.item(), **evaluate(average, *held_out, front_end))
        elif step % 20 == 0:
            run.log(loss=loss.item())
    return average  # type: ignore[return-value]


def crops(
    config: VocoderTrainingConfig,
    front_end: AudioVAEConfig,
    rng: np.random.Generator,
    count: int,
    ringing_share: float,
) -> tuple[Tensor, Tensor]:
    """Log-mel crops (count, 2, crop_frames, bins) and their waveforms (count, 2, samples).

    Each crop holds the clip's loudest moment, somewhere: most of a clip is silence.
    """
    scenes = []
    for _ in range(count):
        is_ringing = rng.random() < ringing_share
        given = RINGING[rng.integers(len(RINGING))] if is_ringing else {}
        world = config.worlds[rng.integers(len(config.worlds))]
        scenes.append(sample_scene(rng, world=world, **given))
    sound = np.stack([synthesise(scene) for scene in scenes])
    waveform = torch.from_numpy(sound)
    mel = log_mel(waveform, front_end)
    hop = waveform.shape[-1] // (mel.shape[2] - 1)
    last = mel.shape[2] - 1 - config.crop_frames
    loudest = mel.mean(dim=(1, 3)).argmax(dim=1).numpy()
    starts = (loudest - rng.integers(0, config.crop_frames, count)).clip(0, last)
    mels = [m[:, s : s + config.crop_frames] for m, s in zip(mel, starts, strict=True)]
    # Mel frame i is centred on sample i * hop, and the vocoder's output begins at frame 0.
    samples = config.crop_frames * hop
    parts = [w[:, s * hop : s * hop + samples] for w, s in zip(waveform, starts, strict=True)]
    return torch.stack(mels), torch.stack(parts)


def spectral_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Distance of magnitudes, relative to each sound's own, and of their logarithms.

    Averaged over four window lengths, none longer than three mel frames: from an unchanging mel a
    vocoder makes sound that repeats with every frame, so only multiples of the frame rate. A longer
    window tells such a tone from the wanted one beside it, and silence is then the best answer.
    Relative to the whole batch, or in logarithms alone, the
    many silent bins outweigh an impact, and impacts came out 15 dB too quiet.
    """
    losses = []
    for n_fft in (64, 128, 256, 512):
        a, b = magnitude(made, n_fft), magnitude(wanted, n_fft)
        relative = (a - b).abs().mean(dim=(1, 2)) / b.mean(dim=(1, 2)).clamp_min(1e-3)
        logarithmic = (a.clamp_min(1e-2).log() - b.clamp_min(1e-2).log()).abs().mean()
        losses.append(relative.mean() + logarithmic)
    return torch.stack(losses).mean()


def level_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Distance in nats of the power in eight bands and windows of 48 ms, which know no phase."""

    def power(waveform: Tensor) -> Tensor:
        bins = magnitude(waveform, 256)[:, 1:].square()  # (2B, 128, frames), 4 ms apart
        return F.avg_pool2d(bins, (16, 12), ceil_mode=True)

    floor = 1e-3  # some 40 dB below an impact; what lies there may differ
    return ((power(made) + floor).log() - (power(wanted) + floor).log()).abs().mean()


def magnitude(waveform: Tensor, n_fft: int) -> Tensor:
    """(B, 2, samples) -> (2B, n_fft/2 + 1, frames)."""
    window = torch.hann_window(n_fft, device=waveform.device)
    spectrum = torch.stft(
        waveform.flatten(0, 1), n_fft, n_fft // 4, window=window, return_complex=True
    )
    return (torch.view_as_real(spectrum).square().sum(-1) + 1e-8).sqrt()


def mel_loss(made: Tensor, mel: Tensor, front_end: AudioVAEConfig) -> Tensor:
    """Distance of log-mels, away from the crop's ends, whose windows saw the missing context."""
    again = log_mel(made, front_end)[:, :, 4 : mel.shape[2] - 4]
    floor = -8.0  # below this all is silence
    return F.l1_loss(again.clamp_min(floor), mel[:, :, 4:-4].clamp_min(floor))


@torch.no_grad()
def evaluate(
    vocoder: nn.Module, mel: Tensor, waveform: Tensor, front_end: AudioVAEConfig
) -> dict[str, float]:
    """On held-out crops: log-mel distance (nats) and level error (dB, made over wanted) of all
    together and in the median crop."""
    made = vocoder(mel)
    level = 10 * (made.square().mean() / waveform.square().mean()).log10()
    each = 10 * (made.square().mean(dim=(1, 2)) / waveform.square().mean(dim=(1, 2))).log10()
    return {
        "mel_l1": mel_loss(made, mel, front_end).item(),
        "level_db": level.item(),
        "median_level_db": each.median().item(),
    }


if __name__ == "__main__":
    run_script(__doc__, VocoderTrainingConfig, train)
