"""Trains a joint audio-video transformer on precomputed latents: from nothing, or on (`start`).

    python -m aiprod_trainer.train_base configs/nano/transformer.yaml --out runs/transformer

One process a core is twice as fast as two threads on networks this small:

    torchrun --nproc-per-node 2 -m aiprod_trainer.train_base CONFIG --out FOLDER

The processes average their gradients; the checkpoint does not depend on who wrote it.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.kernels.apply import compile_blocks
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import (
    load_text_encoder,
    load_text_projector,
    load_transformer,
)
from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.transformer import Transformer, TransformerConfig, init_weights
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_core.types import AudioLatentShape, ScaleFactors, VideoLatentShape
from aiprod_pipelines.cache import keep_compiled_code
from aiprod_trainer.config import Section, run_script
from aiprod_trainer.data import Batch, LatentDataset
from aiprod_trainer.distributed import average_gradients, join
from aiprod_trainer.objective import noise_tokens, pair_sigmas, velocity_loss
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.run import Run, averaged_copy, update_average


class BaseTrainingConfig(Section):
    transformer: dict[str, Any]  # the checkpoint's "transformer" section, published keys
    text_encoder: dict[str, Any]  # the checkpoint's "text_encoder" section
    codecs: Path  # checkpoint with both codecs: gives the latent shapes
    text_encoder_path: Path | None = None
    start: Path | None = None  # checkpoint whose transformer and text projection are trained on
    latents: Path  # folder made by prepare_world
    held_out: Path | None = None  # another such folder, for the validation loss
    fps: float = 12.0
    batch_size: int = 32  # over all processes; of larger clips as many as have these tokens
    steps: int = 4000
    warmup_steps: int = 50
    muon_lr: float = 3e-3
    adamw_lr: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    noise_shift: float = 1.2
    shifted_share: float = 1.0
    joint_share: float = 0.5
    clean_share: float = 0.25
    first_frame_p: float = 0.1  # share of clips whose first latent frame is given
    caption_dropout: float = 0.1
    feature_dropout: float = 0.0  # share of the text features that half of the captions lose
    audio_weight: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"  # of products; weights are float32
    object_weight: float = 0.0  # extra weight of the latent cells in which an object is seen
    ema_decay: float = 0.999
    compile: bool = True
    seed: int = 0
    eval_every: int = 250
    save_every_s: float = 180.0


class TextToClip(nn.Module):
    """What is trained: the transformer and the projection of text features to its contexts."""

    def __init__(self, transformer: Transformer, projector: TextProjector):
        super().__init__()
        self.transformer = transformer
        self.projector = projector


def train(config: BaseTrainingConfig, folder: Path) -> TextToClip:
    """Runs the training to its end and returns the averaged model."""
    rank, world_size = join()
    torch.manual_seed(config.seed)
    codecs = open_checkpoint(config.codecs)
    scale = VideoVAEConfig.from_metadata(codecs.section("vae")).scale
    text_encoder = load_text_encoder(codecs, config.text_encoder_path)
    with torch.no_grad():
        hidden, mask = text_encoder.encode([""])
    empty = {"hidden": hidden[0][mask[0].bool()]}
    data = LatentDataset(config.latents, hidden.shape[1], empty)
    model = TextToClip(
        Transformer(TransformerConfig.from_metadata(config.transformer)),
        TextProjector(TextConfig.from_metadata(config.transformer, *hidden.shape[2:])),
    )
    if config.start is None:
        init_weights(model.transformer)
    else:
        start_from(model, config.start)
    average = averaged_copy(model)
    optimizers = muon_and_adamw(
        model,
        muon_lr=config.muon_lr,
        adamw_lr=config.adamw_lr,
        weight_decay=config.weight_decay,
        iterations=3,  # five take as long as the gradient itself on a CPU
        rank=rank,
        world_size=world_size,
    )
    run = Run(
        folder,
        {"model": model, "average": average, **optimizers},
        config,
        total_steps=config.steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
        rank=rank,
    )
    if config.compile:
        keep_compiled_code(model.transformer.config)
        # Each bucket's shape for itself: code for any shape is slower.
        compile_blocks(model.transformer, dynamic=False)
    local_batch = config.batch_size // world_size
    is_half = config.precision == "bfloat16"
    started = time.monotonic()
    for step in run.steps():
        rng = run.numpy_generator(step)
        # The same for all processes, which would wait for the one with the most work.
        bucket = data.draw_bucket(np.random.default_rng([config.seed, step]))
        count = data.as_many_tokens(bucket, local_batch)
        batch = data.draw(bucket, [rng] * count, config.caption_dropout)
        set_learning_rate(
            optimizers.values(), warmup_then_linear_decay(step, config.steps, config.warmup_steps)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            video_loss, audio_loss = losses(model, batch, run.generator(step), config, scale)
        loss = video_loss + config.audio_weight * audio_loss
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(model, world_size)
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):  # Muon's products too
            for optimizer in optimizers.values():
                optimizer.step()
        update_average(average, model, step, config.ema_decay)
        if step % 20 == 0:
            rate = 20 * config.batch_size / (time.monotonic() - started)
            started = time.monotonic()
            run.log(
                loss=loss.item(),
                video=video_loss.item(),
                audio=audio_loss.item(),
                clips_per_s=rate,
            )
        if config.held_out is not None and (step + 1) % config.eval_every == 0 and rank == 0:
            run.log(**validate(average, config, data, scale))
    return average  # type: ignore[return-value]


def start_from(model: TextToClip, path: Path) -> None:
    """Takes the weights of a checkpoint's transformer and text projection, of the same shapes."""
    checkpoint = open_checkpoint(path)
    for part, load in (
        (model.transformer, load_transformer),
        (model.projector, load_text_projector),
    ):
        part.load_state_dict(load(checkpoint, dtype=torch.float32).state_dict())


def losses(
    model: TextToClip,
    batch: Batch,
    generator: torch.Generator,
    config: BaseTrainingConfig,
    scale: ScaleFactors,
) -> tuple[Tensor, Tensor]:
    """Video and audio velocity losses of one batch at random noise levels.

    The first latent frame is given to all clips of a batch or to none: where all tokens share a
    noise level, the modulation is computed once a clip and not once a token.
    """
    sigmas = pair_sigmas(
        len(batch),
        generator,
        shift=config.noise_shift,
        shifted_share=config.shifted_share,
        joint_share=config.joint_share,
        clean_share=config.clean_share,
    )
    has_first_frame = bool(torch.rand((), generator=generator) < config.first_frame_p)
    if config.feature_dropout:
        hidden = drop_features(batch.text["hidden"], config.feature_dropout, generator)
        batch = replace(batch, text={**batch.text, "hidden": hidden})
    return losses_at(
        model, batch, sigmas, has_first_frame, generator, config.fps, scale, config.object_weight
    )


def drop_features(hidden: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Text states (B, S, D, L) without `share` of their features in half of the captions.

    A word then cannot be known by one feature alone, which an unseen synonym may lack. What is left
    is enlarged to the same mean (Srivastava et al., 2014); a caption's tokens lose the same.
    """
    count, _, *features = hidden.shape
    is_lost = torch.rand(count, 1, *features, generator=generator) < share
    is_chosen = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return hidden * torch.where(is_chosen, ~is_lost / (1 - share), 1.0)


def losses_at(
    model: TextToClip,
    batch: Batch,
    sigmas: tuple[Tensor, Tensor],
    has_first_frame: bool,
    generator: torch.Generator,
    fps: float,
    scale: ScaleFactors,
    object_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Video and audio velocity losses at the given noise levels (B,) of each modality.

    A clip is mostly background: with an `object_weight`, cells in which an object is seen (the
    batch's `object_cells`) count 1 + object_weight times.
    """
    assert batch.video is not None and batch.audio is not None
    video_grid = VideoGrid(VideoLatentShape(*batch.video.shape), scale, fps)
    audio_grid = AudioGrid(AudioLatentShape(*batch.audio.shape))
    video_context, audio_context, _ = model.projector(batch.text["hidden"], batch.mask)
    given = None
    if has_first_frame:
        given = torch.zeros(len(batch.video), video_grid.num_tokens, 1)
        given[:, : video_grid.tokens_per_frame] = 1
    video = noise_tokens(
        video_grid.patchify(batch.video),
        sigmas[0],
        video_grid.positions(),
        video_context,
        generator,
        given=given,
    )
    audio = noise_tokens(
        audio_grid.patchify(batch.audio),
        sigmas[1],
        audio_grid.positions(),
        audio_context,
        generator,
    )
    if object_weight:
        cells = batch.extras["object_cells"].flatten(1)[..., None]  # tokens go over F, H, W
        video = replace(video, weight=video.weight * (1 + object_weight * cells))
    video_velocity, audio_velocity = model.transformer(video.modality, audio.modality)
    return velocity_loss(video_velocity, video), velocity_loss(audio_velocity, audio)


@torch.no_grad()
def validate(
    model: nn.Module, config: BaseTrainingConfig, training_data: LatentDataset, scale: ScaleFactors
) -> dict[str, float]:
    """Losses on 64 held-out clips at four fixed noise levels, shared by both modalities."""
    assert config.held_out is not None
    data = LatentDataset(config.held_out, training_data.max_length)
    batch = data.draw(data.buckets[0], [np.random.default_rng(0)] * 64, caption_dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.2, 0.5, 0.8, 0.95]).repeat(16)
    video, audio = losses_at(model, batch, (sigma, sigma), False, generator, config.fps, scale)  # type: ignore[arg-type]
    return {"held_video": video.item(), "held_audio": audio.item()}


if __name__ == "__main__":
    run_script(__doc__, BaseTrainingConfig, train)
