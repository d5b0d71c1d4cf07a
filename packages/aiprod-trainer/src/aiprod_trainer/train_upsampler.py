"""Trains a latent upsampler of the LTX-2 classes on the procedural world: x2 in space or in time.

    python -m aiprod_trainer.train_upsampler configs/nano/spatial_upscaler.yaml --out runs/spatial

A scene is rendered twice, at `size` and twice as large (or at every other frame and at all), both
are encoded, and the network learns the way from one latent to the other. The loss is taken between
normalised latents, where a channel weighs what it matters to the picture.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_upsampler, load_video_decoder, load_video_encoder
from aiprod_core.model.upsampler import LatentUpsampler, UpsamplerConfig, upsample_latent
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder
from aiprod_trainer.config import Section, run_script
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.run import Run, averaged_copy, update_average
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene


class UpsamplerTrainingConfig(Section):
    upsampler: dict[str, Any]  # the file's flat config, published keys
    codecs: Path  # checkpoint with the video VAE
    start: Path | None = None  # an upsampler's file of the same shape that is trained on
    precision: Literal["float32", "bfloat16"] = "float32"  # of the encoder's convolutions
    world: str = "v1"
    size: int = 64  # pixels of the smaller clip
    num_frames: int = 25  # of the longer clip
    crop_frames: int = 9  # training clips are random crops in time, on the codec's grid
    batch_size: int = 8
    steps: int = 1000
    warmup_steps: int = 50
    muon_lr: float = 1e-3
    adamw_lr: float = 5e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    seed: int = 0
    eval_every: int = 100
    save_every_s: float = 180.0

    @property
    def doubles(self) -> Literal["time", "space"]:
        return "time" if self.upsampler.get("temporal_upsample") else "space"


def train(config: UpsamplerTrainingConfig, folder: Path) -> LatentUpsampler:
    """Runs the training to its end and returns the averaged network."""
    torch.manual_seed(config.seed)
    codecs = open_checkpoint(config.codecs)
    encoder = load_video_encoder(codecs, dtype=torch.float32)
    decoder = load_video_decoder(codecs, dtype=torch.float32)
    upsampler = LatentUpsampler(UpsamplerConfig.from_metadata(config.upsampler))
    if config.start is not None:
        before = load_upsampler(open_checkpoint(config.start), dtype=torch.float32)
        upsampler.load_state_dict(before.state_dict())
    else:
        for block in upsampler.modules():  # residual blocks start as the identity
            if hasattr(block, "norm2"):
                nn.init.zeros_(block.norm2.weight)  # type: ignore[arg-type]
    average = averaged_copy(upsampler)
    optimizers = muon_and_adamw(upsampler, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    run = Run(
        folder,
        {"model": upsampler, "average": average, **optimizers},
        config,
        total_steps=config.steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
    )
    held_out = clips(config, np.random.default_rng([config.seed, 2**31]), 8, config.num_frames)
    is_half = config.precision == "bfloat16"
    for step in run.steps():
        small, large = clips(
            config, run.numpy_generator(step), config.batch_size, config.crop_frames
        )
        set_learning_rate(
            optimizers.values(), warmup_then_linear_decay(step, config.steps, config.warmup_steps)
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            source, target = encoder(small).float(), encoder(large).float()
        made = upsample_latent(upsampler, source, encoder.per_channel_statistics)
        loss = F.mse_loss(made, target)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(upsampler.parameters(), config.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        update_average(average, upsampler, step, config.ema_decay)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            run.log(loss=loss.item(), **evaluate(average, encoder, decoder, held_out, config))
        elif step % 20 == 0:
            run.log(loss=loss.item())
    return average  # type: ignore[return-value]


def clips(
    config: UpsamplerTrainingConfig, rng: np.random.Generator, count: int, num_frames: int
) -> tuple[Tensor, Tensor]:
    """`count` clips in [-1, 1] twice, (B, 3, F, S, S): as they come in, as they should come out."""
    small, large = [], []
    for _ in range(count):
        scene = sample_scene(rng, world=config.world)
        start = rng.integers(0, config.num_frames - num_frames + 1)
        frames = render(scene, config.size)[start : start + num_frames]
        if config.doubles == "time":
            small.append(frames[::2])
            large.append(frames)
        else:
            small.append(frames)
            large.append(render(scene, 2 * config.size)[start : start + num_frames])
    return _pixels(small), _pixels(large)


def _pixels(frames: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def evaluate(
    upsampler: nn.Module,
    encoder: VideoEncoder,
    decoder: VideoDecoder,
    held_out: tuple[Tensor, Tensor],
    config: UpsamplerTrainingConfig,
) -> dict[str, float]:
    """PSNR in dB to the true larger clip: upsampled latents decoded, against decoded and resized.

    The rival is bicubic in space, linear blending in time, of the smaller clip's own decoding.
    """
    small, large = held_out
    source = encoder(small)
    made = upsample_latent(upsampler, source, encoder.per_channel_statistics)  # type: ignore[arg-type]
    plain = decoder(source).clamp(-1, 1)
    if config.doubles == "time":
        resized = torch.empty_like(large)
        resized[:, :, ::2] = plain
        resized[:, :, 1::2] = (plain[:, :, 1:] + plain[:, :, :-1]) / 2
    else:
        frames = plain.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, scale_factor=2, mode="bicubic").clamp(-1, 1)
        resized = frames.unflatten(0, (len(small), -1)).transpose(1, 2)
    return {
        "psnr": psnr(decoder(made).clamp(-1, 1), large),
        "resized_psnr": psnr(resized, large),
        "codec_psnr": psnr(decoder(encoder(large)).clamp(-1, 1), large),
    }


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Mean over clips of the PSNR in dB; pixels in [-1, 1]."""
    error = ((made - wanted).square() / 4).flatten(1).mean(dim=1)
    return (-10 * error.log10()).mean().item()


if __name__ == "__main__":
    run_script(__doc__, UpsamplerTrainingConfig, train)
