"""Trains a small video decoder that stands in for the full one in previews.

    python -m aiprod_trainer.train_tiny_decoder configs/nano/tiny_decoder.yaml --out runs/tiny

The teacher is the full decoder, whose pixels are computed once: the small one learns to give them
from prepared latents, half of them disturbed a little, as a model's own latents are. What moves
counts more than the still background. At the end `NAME-tiny-decoder.safetensors` lies in the run's
folder; beside the model it is found by `--decoder tiny`.
"""

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import load_video_decoder
from aiprod_core.model.video_vae import VideoDecoder, VideoVAEConfig
from aiprod_pipelines.companions import model_name
from aiprod_trainer.config import Section, run_script
from aiprod_trainer.data import LatentDataset
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.run import Run, averaged_copy, update_average

MOVES_FROM = 0.1  # distance of a pixel, in [-1, 1], from its mean over the clip
HELD_OUT = 8  # clips


class TinyDecoderConfig(Section):
    model: Path  # file with the full decoder
    name: str | None = None  # of the model in the written file's name; default: the file's
    latents: Path  # prepared clips of one shape
    clips: int = 512  # of them that are learnt from
    decoder_base_channels: int
    decoder_blocks: list[Any]  # published keys, as in the model's "vae" section
    latent_noise: float = 0.1  # largest deviation of what is added to half of the latents
    moving_weight: float = 8.0  # extra weight of pixels that move
    batch_size: int = 4
    steps: int = 3000
    warmup_steps: int = 50
    muon_lr: float = 2e-3
    adamw_lr: float = 1e-3
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    precision: Literal["float32", "bfloat16"] = "float32"  # of convolutions
    seed: int = 0
    eval_every: int = 250
    save_every_s: float = 180.0


def train(config: TinyDecoderConfig, folder: Path) -> Path | None:
    """Runs the training to its end and returns the file; None where it was stopped before."""
    torch.manual_seed(config.seed)
    checkpoint = open_checkpoint(config.model)
    full = load_video_decoder(checkpoint, dtype=torch.float32)
    full.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    tiny = build(config, full)
    average = averaged_copy(tiny)
    optimizers = muon_and_adamw(
        tiny, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr, iterations=3
    )
    latents = read_latents(config)
    run = Run(
        folder,
        {"model": tiny, "average": average, **optimizers},
        config,
        total_steps=config.steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
    )
    latents, held_out = latents[:-HELD_OUT], latents[-HELD_OUT:]
    targets = decode(full, latents)
    for step in run.steps():
        generator = run.generator(step)
        chosen = torch.randint(len(latents), (config.batch_size,), generator=generator)
        set_learning_rate(
            optimizers.values(), warmup_then_linear_decay(step, config.steps, config.warmup_steps)
        )
        latent = disturbed(latents[chosen].float(), config.latent_noise, generator)
        target = targets[chosen].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            made = tiny(latent).float()
        loss = ((made - target).square() * weights(target, config.moving_weight)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(tiny.parameters(), config.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, tiny, step, config.ema_decay)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            run.log(loss=loss.item(), **evaluate(average, full, held_out))
        elif step % 20 == 0:
            run.log(loss=loss.item())
    if run.step < config.steps:
        return None
    assert isinstance(average, VideoDecoder)
    return write(average, checkpoint, folder, config.name or model_name(checkpoint))


def build(config: TinyDecoderConfig, full: VideoDecoder) -> VideoDecoder:
    """A decoder of the given blocks for the same latents and grid, its residual blocks silent."""
    section = full.config.to_metadata() | {
        "decoder_base_channels": config.decoder_base_channels,
        "decoder_blocks": config.decoder_blocks,
        "encoder_blocks": [],
        "timestep_conditioning": False,
    }
    tiny = VideoDecoder(VideoVAEConfig.from_metadata(section))
    if tiny.scale != full.scale:
        raise InputError(
            f"decoder_blocks: they make a grid of {tuple(tiny.scale)}, the model's is "
            f"{tuple(full.scale)} (frames, rows, columns a latent)."
        )
    for name, parameter in tiny.named_parameters():
        if name.endswith("conv2.conv.weight"):
            nn.init.zeros_(parameter)
    tiny.per_channel_statistics.load_state_dict(full.per_channel_statistics.state_dict())
    return tiny.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def read_latents(config: TinyDecoderConfig) -> Tensor:
    """(clips + HELD_OUT, C, F, H, W) as stored. Raises InputError where there are too few."""
    data = LatentDataset(config.latents, max_length=1)
    clips = data.buckets[0].clips[: config.clips + HELD_OUT]
    if len(clips) <= HELD_OUT or "video" not in data.buckets[0].shapes:
        raise InputError(
            f"{config.latents}: {len(clips)} clips with a picture, but {HELD_OUT} are held out; "
            "prepare more."
        )
    return torch.stack([data.parts[part]["video"][row] for part, row in clips])


@torch.no_grad()
def decode(full: nn.Module, latents: Tensor) -> Tensor:
    """The teacher's pixels (clips, 3, F, H, W) as bytes, in which they fit into memory."""
    pixels = [
        ((full(latent[None].float()) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        for latent in track(latents, description="the full decoder's pixels")
    ]
    return torch.cat(pixels)


def disturbed(latent: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Half of the latents (B, C, F, H, W) with noise of a random deviation up to `noise`."""
    shape = (len(latent), 1, 1, 1, 1)
    amount = (2 * torch.rand(shape, generator=generator) - 1).clamp(min=0) * noise
    return latent + amount * torch.randn(latent.shape, generator=generator)


def weights(pixels: Tensor, moving_weight: float) -> Tensor:
    """1, and more where a pixel (B, 3, F, H, W) is away from its mean over the clip."""
    apart = (pixels - pixels.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True)
    return 1 + moving_weight * (apart > MOVES_FROM)


@torch.no_grad()
def evaluate(tiny: nn.Module, full: nn.Module, latents: Tensor) -> dict[str, float]:
    """PSNR in dB to the full decoder's pixels, mean over clips, and how many times as fast."""
    seconds = {"tiny": 0.0, "full": 0.0}
    values = []
    for latent in latents:
        started = time.process_time()
        theirs = full(latent[None].float()).clamp(-1, 1)
        halfway = time.process_time()
        ours = tiny(latent[None].float()).clamp(-1, 1)
        seconds["tiny"] += time.process_time() - halfway
        seconds["full"] += halfway - started
        values.append(-10 * ((ours - theirs).square().mean() / 4).log10().item())
    return {"psnr": float(np.mean(values)), "speed_ratio": seconds["full"] / seconds["tiny"]}


def write(decoder: VideoDecoder, model: Checkpoint, folder: Path, name: str) -> Path:
    path = folder / f"{name}-tiny-decoder.safetensors"
    metadata = {
        "model_version": model.metadata.get("model_version", ""),
        "config": {"vae": decoder.config.to_metadata()},
    }
    save_checkpoint(path, [(key_maps.VIDEO_DECODER, decoder)], metadata, dtype=torch.float16)
    return path


if __name__ == "__main__":
    run_script(__doc__, TinyDecoderConfig, train)
