"""A transformer that looks at a picture tile by tile, so that memory does not bound its size.

At every call each tile goes through the model by itself, its tokens at their positions in the whole
picture, together with all of the sound; velocities are blended where tiles overlap (MultiDiffusion,
Bar-Tal et al. 2023, arXiv:2302.08113), and the sound's averaged. Samplers and guidance do not know.
What it asks for is a picture whose layout stands already: a second stage.

Letters: B batch, N video tokens, H W latent height and width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from aiprod_core.components.guiders import Model
from aiprod_core.model.transformer import Perturbations
from aiprod_core.tiling import blend_weights, split_by_size
from aiprod_core.types import Modality, ScaleFactors


def tile_weights(
    size: tuple[int, int],  # (H, W) of the picture, in latents
    tile: tuple[int, int],  # of a tile
    overlap: tuple[int, int],
) -> Tensor:
    """(tiles, H, W): how much each tile counts where; every place's weights sum to one."""
    rows, columns = (
        _axis_weights(length, side, shared)
        for length, side, shared in zip(size, tile, overlap, strict=True)
    )
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1)


def in_tiles(model: Model, weights: Tensor, scale: ScaleFactors) -> Model:
    """The model applied to each tile of `weights` (tiles, H, W); the model itself for one tile.

    Tokens belong to the tiles in whose place their position begins, conditions as the clip's own.
    """
    if len(weights) == 1:
        return model

    def tiled(
        video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        if video is None:
            return model(video, audio, perturbations)
        row, column = (
            (video.positions[0, axis, :, 0] / scale[axis] + 1e-3).long().clamp(max=size - 1)
            for axis, size in ((1, weights.shape[1]), (2, weights.shape[2]))
        )
        velocity = video.latent.new_zeros(video.latent.shape, dtype=torch.float32)
        sound = None
        for of_token in weights.to(row.device)[:, row, column]:  # (N,)
            index = of_token.nonzero()[:, 0]
            part, part_sound = model(_some_tokens(video, index), audio, perturbations)
            if part is not None:
                velocity[:, index] += part.float() * of_token[index, None]
            if part_sound is not None:
                share = part_sound.float() / len(weights)
                sound = share if sound is None else sound + share
        return velocity, sound

    return tiled


def _axis_weights(length: int, size: int, overlap: int) -> Tensor:
    """(tiles, length)"""
    # The last tile is as large as the others: less context would show.
    tiles = split_by_size(length, size, overlap, smallest=size)
    table = torch.zeros(len(tiles), length)
    for row, tile, weights in zip(table, tiles, blend_weights(tiles), strict=True):
        row[tile.start : tile.end] = weights
    return table


def _some_tokens(video: Modality, index: Tensor) -> Modality:
    count = video.latent.shape[1]
    attention, marker, timesteps = video.attention_mask, video.keyframe_marker, video.timesteps
    if attention is not None:
        attention = attention.expand(-1, count, -1)[:, index][:, :, index]
    return replace(
        video,
        latent=video.latent[:, index],
        timesteps=timesteps if timesteps.shape[1] == 1 else timesteps[:, index],
        positions=video.positions[:, :, index],
        attention_mask=attention,
        keyframe_marker=None if marker is None else marker[:, index],
    )
