"""A training step of ours against a plain loop of diffusers and accelerate.

    python benchmarks/train_step.py --json train_step.json

Both train all weights of the same joint transformer (of nano's size, 2.3 style) on the same clips
with AdamW, in float32: noise, forward, loss, backward, clipping, step. The plain loop is what a
training script of diffusers does: the model as it comes, `accelerator.backward`, `torch.optim`'s
default. Ours is the body of `aiprod train`, its blocks compiled as the configuration asks. Rounds
of steps alternate, and `ratio` is the median over rounds of their time over ours. The first losses
of both must agree.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from torch import Tensor, nn

from aiprod_core.components import conditioning
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.parity.diffusers_peers import transformer_arguments, transformer_name
from aiprod_core.types import AudioLatentShape, ScaleFactors, VideoLatentShape
from aiprod_trainer.named_optimizers import build_optimizers
from aiprod_trainer.objective import noise_state
from aiprod_trainer.train import clip_gradients, losses_of

SECTION: dict[str, Any] = {
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "audio_num_attention_heads": 8,
    "audio_attention_head_dim": 16,
    "audio_in_channels": 32,
    "audio_out_channels": 32,
    "num_layers": 6,
    "cross_attention_dim": 256,
    "audio_cross_attention_dim": 128,
    "av_ca_timestep_scale_multiplier": 1000,
    "frequencies_precision": "float64",
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-compile", action="store_true", help="ours without compiled blocks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    config = TransformerConfig(**SECTION)
    theirs = LTX2VideoTransformer3DModel(**transformer_arguments(config))
    ours = Transformer(config)
    ours.load_state_dict({transformer_name(n): p.clone() for n, p in theirs.state_dict().items()})
    if not options.no_compile:
        for block in ours.transformer_blocks:
            block.compile()
    batch = Batch(options.batch_size, config)
    steps = {
        "ours": OurLoop(ours, accelerator, batch),
        "plain": PlainLoop(theirs, accelerator, batch),
    }
    first = {name: step(0) for name, step in steps.items()}
    difference = abs(first["ours"] - first["plain"]) / first["plain"]
    if difference > 1e-3:
        raise SystemExit(f"the losses differ: {first}")
    for name, step in steps.items():
        first[name] = step(1)  # what is compiled is compiled now
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(options.rounds):
        for name in ("ours", "plain") if number % 2 else ("plain", "ours"):
            started = time.perf_counter()
            for index in range(options.steps):
                steps[name](number * options.steps + index)
            seconds[name].append((time.perf_counter() - started) / options.steps)
    ratios = [plain / own for plain, own in zip(seconds["plain"], seconds["ours"], strict=True)]
    return {
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ours_s": round(median(seconds["ours"]), 4),
        "plain_s": round(median(seconds["plain"]), 4),
        "relative_loss_difference": difference,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "is_compiled": not options.no_compile,
        "torch": torch.__version__,
    }


class Batch:
    """Latents and contexts of nano's shapes, the same for both."""

    def __init__(self, size: int, config: TransformerConfig):
        self.video_grid = VideoGrid(
            VideoLatentShape(size, config.in_channels, 7, 4, 4), ScaleFactors(4, 16, 16), 12.0
        )
        self.audio_grid = AudioGrid(AudioLatentShape(size, 2, 52, 16))
        self.video = torch.randn(self.video_grid.shape)
        self.audio = torch.randn(self.audio_grid.shape)
        self.video_context = torch.randn(size, 64, config.width)
        self.audio_context = torch.randn(size, 64, config.audio_width)
        self.size = size


class OurLoop:
    """The body of `aiprod train`."""

    def __init__(self, model: Transformer, accelerator: Accelerator, batch: Batch):
        self.model, self.accelerator, self.batch = model, accelerator, batch
        self.optimizers = build_optimizers("adamw", model, 1e-4, {})

    def __call__(self, seed: int) -> float:
        batch = self.batch
        sigma = sigmas(seed, batch.size)
        examples = {}
        for name, state, grid, context in (
            ("video", conditioning.video_state(batch.video_grid, batch.video),
             batch.video_grid, batch.video_context),
            ("audio", conditioning.audio_state(batch.audio_grid, batch.audio),
             batch.audio_grid, batch.audio_context),
        ):  # fmt: skip
            examples[name] = noise_state(
                state, sigma, context, generators(seed, batch.size, name),
                num_tokens=grid.num_tokens, is_uniform=True,
            )  # fmt: skip
        losses = losses_of(self.model, examples)
        loss = torch.stack([values.mean() for values in losses.values()]).sum()
        self.accelerator.backward(loss)
        clip_gradients(self.accelerator, list(self.model.parameters()), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()


class PlainLoop:
    """A training script of diffusers."""

    def __init__(self, model: nn.Module, accelerator: Accelerator, batch: Batch):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.accelerator, self.batch = accelerator, batch

    def __call__(self, seed: int) -> float:
        batch = self.batch
        video = batch.video_grid.patchify(batch.video)
        audio = batch.audio_grid.patchify(batch.audio)
        noises = [
            torch.stack([torch.randn(x.shape[1:], generator=g) for g in own])
            for x, own in (
                (video, generators(seed, batch.size, "video")),
                (audio, generators(seed, batch.size, "audio")),
            )
        ]
        sigma = sigmas(seed, batch.size)
        level = sigma[:, None, None]
        predicted = self.model(
            hidden_states=(1 - level) * video + level * noises[0],
            audio_hidden_states=(1 - level) * audio + level * noises[1],
            encoder_hidden_states=batch.video_context,
            audio_encoder_hidden_states=batch.audio_context,
            timestep=(sigma * 1000)[:, None].expand(video.shape[:2]),
            audio_timestep=(sigma * 1000)[:, None].expand(audio.shape[:2]),
            sigma=sigma * 1000,
            audio_sigma=sigma * 1000,
            video_coords=batch.video_grid.positions(),
            audio_coords=batch.audio_grid.positions(),
            return_dict=False,
        )
        loss = sum(
            F.mse_loss(velocity.float(), noise - clean)
            for velocity, noise, clean in zip(predicted, noises, (video, audio), strict=True)
        )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert isinstance(loss, Tensor)
        return loss.item()


def sigmas(seed: int, count: int) -> Tensor:
    return torch.sigmoid(torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def generators(seed: int, count: int, name: str) -> list[torch.Generator]:
    offset = {"video": 1000, "audio": 2000}[name]
    return [torch.Generator().manual_seed(seed * 10_000 + offset + i) for i in range(count)]


if __name__ == "__main__":
    main()
