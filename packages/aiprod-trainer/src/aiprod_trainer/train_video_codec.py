"""Trains a video VAE of the LTX-2 classes on the procedural world.

    python -m aiprod_trainer.train_video_codec configs/nano/video_codec.yaml --out runs/video_codec

Clips are rendered as the training asks for them. The loss is the mean squared error, heavier on
and around the object (a 64-pixel clip is mostly background), plus a trace of a KL term. Killed and
started again, it goes on from its last checkpoint with the same numbers.

With `start` it goes on from a checkpoint's codec, and with `keep_latents` the latents of what a
transformer was trained on stay what they were there, so that it stays valid while the codec learns
further sizes or another world.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_video_decoder, load_video_encoder
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_trainer.config import Section, run_script
from aiprod_trainer.distributed import average_gradients, join
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.run import Run, averaged_copy, update_average
from aiprod_trainer.world.render import object_mask, render
from aiprod_trainer.world.scene import sample_scene


class VideoCodecConfig(Section):
    vae: dict[str, Any]  # the checkpoint's "vae" section, published keys
    world: str = "v1"
    size: int = 64  # pixels, height and width
    further_sizes: tuple[int, ...] = ()  # taken in turn with `size`, a step each
    further_worlds: tuple[str, ...] = ()  # taken in turn with `world`, at every size
    start: Path | None = None  # checkpoint whose codec is trained on
    keep_latents: float = 0.0  # weight of the distance from the start's latents, of `world` alone
    kept_sizes: tuple[int, ...] | None = None  # at which they are kept; default: `size`
    precision: Literal["float32", "bfloat16"] = "float32"  # of convolutions; weights are float32
    num_frames: int = 25
    crop_frames: int = 9  # training clips are random crops in time, on the codec's grid
    batch_size: int = 4  # clips a process
    steps: int = 4000
    warmup_steps: int = 50
    muon_lr: float = 3e-4
    adamw_lr: float = 2.5e-4
    muon_iterations: int = 5
    max_grad_norm: float = 1.0
    object_weight: float = 8.0  # extra weight of the pixels on and around the object
    kl_weight: float = 1e-6
    train: str = "all"  # "all", or "decoder": the last tuning, with the latents left as they are
    ema_decay: float = 0.998
    seed: int = 0
    eval_every: int = 200
    save_every_s: float = 180.0


class VideoVAE(nn.Module):
    """Both halves, so that one state dict holds the codec."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)


def train(config: VideoCodecConfig, folder: Path) -> VideoVAE:
    """Runs the training to its end and returns the averaged model."""
    rank, world_size = join()
    torch.manual_seed(config.seed)
    vae = VideoVAE(VideoVAEConfig.from_metadata(config.vae))
    if config.start is None:
        initialise(vae)
    else:
        start_from(vae, config.start)
    vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    average = averaged_copy(vae)
    start_encoder = averaged_copy(vae.encoder)
    if config.train == "decoder":
        vae.encoder.requires_grad_(False)
    optimizers = muon_and_adamw(
        vae,
        muon_lr=config.muon_lr,
        adamw_lr=config.adamw_lr,
        iterations=config.muon_iterations,
        rank=rank,
        world_size=world_size,
    )
    run = Run(
        folder,
        {"model": vae, "average": average, **optimizers},
        config,
        total_steps=config.steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
        rank=rank,
    )
    sizes = (config.size, *config.further_sizes)
    kinds = [(world, size) for world in (config.world, *config.further_worlds) for size in sizes]
    kept = {(config.world, size) for size in config.kept_sizes or (config.size,)}
    held_out = {
        (world, size): clips(
            world, size, np.random.default_rng([config.seed, 2**31]), 16, config.num_frames
        )
        for world, size in kinds
    }
    for step in run.steps():
        world, size = kinds[step % len(kinds)]
        # As many pixels a step at every size.
        count = max(1, config.batch_size * config.size**2 // size**2)
        rng = run.numpy_generator(step)
        pixels, mask = clips(
            world, size, rng, count, config.num_frames, crop_frames=config.crop_frames
        )
        set_learning_rate(
            optimizers.values(), warmup_then_linear_decay(step, config.steps, config.warmup_steps)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            mean, logvar = (moment.float() for moment in vae.encoder.moments(pixels))
            noise = torch.randn(mean.shape, generator=run.generator(step))
            sampled = mean + noise * (0.5 * logvar).exp()
            # The decoder takes normalised latents: a codec from a checkpoint has statistics.
            decoded = vae.decoder(vae.encoder.per_channel_statistics.normalize(sampled)).float()
        reconstruction = reconstruction_loss(decoded, pixels, mask, config.object_weight)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction + config.kl_weight * kl
        if config.keep_latents and (world, size) in kept:
            with (
                torch.no_grad(),
                torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"),
            ):
                wanted = start_encoder(pixels).float()
            normalized = vae.encoder.per_channel_statistics.normalize(mean)
            loss = loss + config.keep_latents * F.mse_loss(normalized, wanted)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(vae, world_size)
        nn.utils.clip_grad_norm_(vae.parameters(), config.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        update_average(average, vae, step, config.ema_decay)
        is_time = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
        if rank == 0 and is_time:
            scores = {
                f"{key}_{world}_{size}": value
                for (world, size), tensors in held_out.items()
                for key, value in evaluate(average, *tensors).items()
            }
            run.log(loss=loss.item(), kl=kl.item(), **scores)
        elif step % 20 == 0:
            run.log(loss=loss.item(), kl=kl.item())
    return average  # type: ignore[return-value]


def clips(
    world: str,
    size: int,
    rng: np.random.Generator,
    count: int,
    num_frames: int,
    *,
    crop_frames: int | None = None,  # a random stretch of each clip; default: all
) -> tuple[Tensor, Tensor]:
    """Rendered pixels (count, 3, F, size, size) in [-1, 1] and object masks (count, 1, F, ...)."""
    length = crop_frames or num_frames
    pixels, masks = [], []
    for _ in range(count):
        scene = sample_scene(rng, world=world)
        start = rng.integers(0, num_frames - length + 1)
        frames = slice(start, start + length)
        pixels.append(render(scene, size)[frames])
        masks.append(object_mask(scene, size)[frames])
    video = torch.from_numpy(np.stack(pixels)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    mask = torch.from_numpy(np.stack(masks)).float()[:, None]
    return video.contiguous(memory_format=torch.channels_last_3d), mask


def reconstruction_loss(
    decoded: Tensor, pixels: Tensor, mask: Tensor, object_weight: float
) -> Tensor:
    """Mean squared error, heavier on the object and a rim of two pixels, where edges leak."""
    near_object = F.max_pool3d(mask, (1, 5, 5), stride=1, padding=(0, 2, 2))
    return ((decoded - pixels).square() * (1 + object_weight * near_object)).mean()


@torch.no_grad()
def evaluate(vae: nn.Module, pixels: Tensor, mask: Tensor) -> dict[str, float]:
    """PSNR in dB over whole frames and over the object's pixels, per clip, then averaged."""
    decoded = torch.cat([vae.decoder(vae.encoder(clip)) for clip in pixels.split(4)]).clamp(-1, 1)
    squared = (decoded - pixels).square() / 4  # pixel range 2
    whole = -10 * squared.mean(dim=(1, 2, 3, 4)).log10()
    inside = (squared * mask).sum(dim=(1, 2, 3, 4)) / (3 * mask.sum(dim=(1, 2, 3, 4)))
    return {"psnr": whole.mean().item(), "object_psnr": (-10 * inside.log10()).mean().item()}


def start_from(vae: VideoVAE, path: Path) -> None:
    """Takes weights and latent statistics of a checkpoint's codec of the same shape."""
    checkpoint = open_checkpoint(path)
    for half, load in ((vae.encoder, load_video_encoder), (vae.decoder, load_video_decoder)):
        half.load_state_dict(load(checkpoint, dtype=torch.float32).state_dict())


def initialise(vae: nn.Module) -> None:
    """Residual blocks start as the identity, and latents almost without noise.

    Without the first the codec diverged at these rates; with a log-variance of 0 at the start it
    spent its first hundreds of steps fighting the noise.
    """
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.conv.weight"):
            nn.init.zeros_(parameter)
    last = vae.encoder.conv_out.conv
    nn.init.zeros_(last.weight[-1])  # the log-variance that all channels share
    nn.init.constant_(last.bias[-1], -6.0)


if __name__ == "__main__":
    run_script(__doc__, VideoCodecConfig, train)
