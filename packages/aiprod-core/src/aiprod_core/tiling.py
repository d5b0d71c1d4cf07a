"""Encoding and decoding in overlapping tiles, so that memory does not grow with the clip.

An axis of latents is split into intervals whose ends overlap; each tile goes through the network by
itself and fades into its neighbours over the overlap. A clip is the product of its axes, so the
weights of each axis are normalised alone. In time, frames are handed out as soon as no later tile
touches them.

Letters: B batch, C channels, F frames, H W height and width, in latents or pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder
from aiprod_core.types import ScaleFactors

# Overlaps below which seams of tiled encoding can be seen.
MIN_ENCODE_OVERLAP_FRAMES = 16
MIN_ENCODE_OVERLAP_PIXELS = 64


class Interval(NamedTuple):
    """Positions [start, end) of a tile on one axis, fading in and out over its ramps."""

    start: int
    end: int
    left_ramp: int
    right_ramp: int


@dataclass(frozen=True)
class BySize:
    """Tiles of `size` with `overlap`, in pixels or frames: multiples of the VAE's factor."""

    size: int
    overlap: int


@dataclass(frozen=True)
class ByCount:
    """`count` tiles of about equal size with `overlap`, in latents."""

    count: int
    overlap: int


AxisTiling = BySize | ByCount | None


@dataclass(frozen=True)
class Tiling:
    """How each axis is split; None leaves an axis whole.

    Neighbours fade into each other over `fade` of what they share, in its middle: next to a cut a
    tile knows too little of its surroundings. The published decoders fade over all of it.
    """

    frames: AxisTiling = None
    height: AxisTiling = None
    width: AxisTiling = None
    fade: float = 1.0


class Span(NamedTuple):
    """One tile on one axis: where it is, and its weights on the side of the output."""

    latent: slice
    pixels: slice
    weights: Tensor


def default_tiling(height: int, width: int, scale: ScaleFactors) -> Tiling:
    """Tiles that fit a large model's decoder in memory: 768 pixels on the long side, 80 frames.

    The short side's tile keeps the picture's proportions, in whole latents.
    """
    long = max(height, width)

    def axis(side: int, factor: int) -> BySize:
        overlap = _round_up(64, factor)
        size = round(768 * side / long / factor) * factor
        return BySize(max(size, overlap + factor, 2 * factor), overlap)

    frames_overlap = _round_up(24, scale.time)
    frames = BySize(max(_round_up(80, scale.time), frames_overlap + scale.time), frames_overlap)
    return Tiling(frames, axis(height, scale.height), axis(width, scale.width))


def decode_chunks(
    decoder: VideoDecoder,
    latent: Tensor,
    tiling: Tiling,
    *,
    timestep: Tensor | None = None,
    generator: torch.Generator | None = None,
    ready: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Decodes normalised latents (B, C, F, H, W) and yields pixels (B, 3, frames, H, W) in order.

    Memory holds one tile in time, whatever the clip's length. `ready(n)` is called before latent
    frames up to n are first read: a clip in the making is written into `latent` then. Raises
    InputError for a tiling that does not fit the VAE's factors, before anything is decoded.
    """
    num_latents, *size = latent.shape[2:]
    # A tile one latent wide cannot be padded by reflection.
    smallest = 2 if decoder.config.decoder_padding_mode == "reflect" else 1
    device = latent.device
    times = time_spans(tiling.frames, num_latents, decoder.scale.time, device, fade=tiling.fade)
    rows, columns = (
        space_spans(axis, length, factor, smallest, device, fade=tiling.fade)
        for axis, length, factor in zip(
            (tiling.height, tiling.width), size, decoder.scale[1:], strict=True
        )
    )
    decode = partial(decoder, timestep=timestep, generator=generator)
    return _decode_spans(decode, latent, times, rows, columns, ready)


def _decode_spans(
    decode: Callable[[Tensor], Tensor],
    latent: Tensor,
    times: list[Span],
    rows: list[Span],
    columns: list[Span],
    ready: Callable[[int], None] | None,
) -> Iterator[Tensor]:
    pending = None  # what earlier tiles gave to the frames from this tile's first on
    for index, time in enumerate(times):
        if ready is not None:
            ready(time.latent.stop)
        pixels = _decode_plane(decode, latent[:, :, time.latent], rows, columns)
        if len(times) > 1:
            pixels *= time.weights[:, None, None]
        if pending is not None:
            pixels[:, :, : pending.shape[2]] += pending
        is_last = index + 1 == len(times)
        done = pixels.shape[2] if is_last else times[index + 1].pixels.start - time.pixels.start
        # Neither a view nor a name may keep this tile in memory while the next is decoded.
        pending = pixels[:, :, done:].clone()
        if done:
            yield pixels[:, :, :done]
        del pixels


def _decode_plane(
    decode: Callable[[Tensor], Tensor], latent: Tensor, rows: list[Span], columns: list[Span]
) -> Tensor:
    """One tile of time over the whole height and width."""
    if len(rows) == len(columns) == 1:
        return decode(latent)
    plane = None
    for row in rows:
        for column in columns:
            tile = decode(latent[..., row.latent, column.latent])
            if plane is None:
                size = (rows[-1].pixels.stop, columns[-1].pixels.stop)
                plane = tile.new_zeros((*tile.shape[:3], *size))
            plane[..., row.pixels, column.pixels] += tile * (row.weights[:, None] * column.weights)
    assert plane is not None
    return plane


def encode_tiled(encoder: VideoEncoder, pixels: Tensor, tiling: Tiling) -> Tensor:
    """Encodes pixels (B, 3, F, H, W) in tiles to normalised mean latents (B, C, F', H', W').

    Raises InputError for overlaps under 16 frames or 64 pixels on an axis that is split: what a
    latent sees reaches that far.
    """
    scale = encoder.scale
    num_latents = (pixels.shape[2] - 1) // scale.time + 1
    height, width = pixels.shape[3] // scale.height, pixels.shape[4] // scale.width
    times = time_spans(tiling.frames, num_latents, scale.time, pixels.device, of_latents=True)
    rows = space_spans(tiling.height, height, scale.height, 1, pixels.device, of_latents=True)
    columns = space_spans(tiling.width, width, scale.width, 1, pixels.device, of_latents=True)
    _check_encode_overlap("frames", tiling.frames, times, scale.time, MIN_ENCODE_OVERLAP_FRAMES)
    _check_encode_overlap("height", tiling.height, rows, scale.height, MIN_ENCODE_OVERLAP_PIXELS)
    _check_encode_overlap("width", tiling.width, columns, scale.width, MIN_ENCODE_OVERLAP_PIXELS)
    latent = None
    for time in times:
        for row in rows:
            for column in columns:
                part = pixels[:, :, time.pixels, row.pixels, column.pixels]
                tile = encoder(part)
                if latent is None:
                    shape = (*tile.shape[:2], num_latents, height, width)
                    latent = tile.new_zeros(shape)
                plane = row.weights[:, None] * column.weights
                weighted = tile * (time.weights[:, None, None] * plane)
                latent[:, :, time.latent, row.latent, column.latent] += weighted
    assert latent is not None
    return latent


def space_spans(
    tiling: AxisTiling,
    length: int,
    factor: int,
    smallest: int = 1,
    device: torch.device | str = "cpu",
    *,
    of_latents: bool = False,
    fade: float = 1.0,
) -> list[Span]:
    """Tiles of height or width: `length` latents of `factor` pixels, none under `smallest` latents.

    Weights are per pixel, or per latent where that is the output.
    """
    latents = intervals(tiling, length, factor, smallest)
    pixels = [Interval(*(factor * number for number in interval)) for interval in latents]
    weights = blend_weights(latents if of_latents else pixels, fade=fade, device=device)
    return [
        Span(slice(a.start, a.end), slice(b.start, b.end), w)
        for a, b, w in zip(latents, pixels, weights, strict=True)
    ]


def time_spans(
    tiling: AxisTiling,
    length: int,
    factor: int,
    device: torch.device | str = "cpu",
    *,
    of_latents: bool = False,
    fade: float = 1.0,
) -> list[Span]:
    """Tiles of time on the causal grid.

    A tile's first latent stands for one frame wherever the tile is cut, so each later tile starts
    one latent earlier and gives that one the weight 0.
    """
    latents = start_earlier(intervals(tiling, length, factor))
    pixels = [to_frames_interval(interval, factor) for interval in latents]
    weights = blend_weights(
        latents if of_latents else pixels, from_zero=True, fade=fade, device=device
    )
    return [
        Span(slice(a.start, a.end), slice(b.start, b.end), w)
        for a, b, w in zip(latents, pixels, weights, strict=True)
    ]


def intervals(tiling: AxisTiling, length: int, factor: int, smallest: int = 1) -> list[Interval]:
    """An axis of `length` latents, each `factor` pixels long, as its tiling says."""
    if isinstance(tiling, ByCount):
        return split_by_count(length, tiling.count, tiling.overlap)
    if isinstance(tiling, BySize):
        if tiling.size % factor or tiling.overlap % factor or tiling.size < 2 * factor:
            size = max(2, round(tiling.size / factor)) * factor
            overlap = round(tiling.overlap / factor) * factor
            raise InputError(
                f"tile size and overlap must be multiples of {factor}, the size at least "
                f"{2 * factor}; got {tiling.size} and {tiling.overlap}, try {size} and {overlap}"
            )
        return split_by_size(length, tiling.size // factor, tiling.overlap // factor, smallest)
    return [Interval(0, length, 0, 0)]


def split_by_size(length: int, size: int, overlap: int, smallest: int = 1) -> list[Interval]:
    """Tiles of `size`; the last may be shorter, and grows to the left if under `smallest`."""
    if not 0 <= overlap < size:
        raise InputError(f"a tile's overlap must be below its size; got {overlap} and {size}")
    if length <= size:
        return [Interval(0, length, 0, 0)]
    step = size - overlap
    count = (length + size - 2 * overlap - 1) // step
    bounds = [(i * step, min(i * step + size, length)) for i in range(count)]
    start, end = bounds[-1]
    bounds[-1] = (max(0, min(start, end - smallest)), end)
    return _with_ramps(bounds)


def split_by_count(length: int, count: int, overlap: int) -> list[Interval]:
    """`count` tiles whose sizes differ by one at most, the larger first."""
    size, larger = divmod(length + overlap * (count - 1), max(count, 1))
    if count < 1 or overlap < 0 or (count > 1 and size <= overlap):
        raise InputError(
            f"{length} latents cannot be split into {count} tiles with an overlap of {overlap}; "
            "use fewer tiles or less overlap"
        )
    bounds, start = [], 0
    for i in range(count):
        end = start + size + (i < larger)
        bounds.append((start, end))
        start = end - overlap
    return _with_ramps(bounds)


def start_earlier(tiles: list[Interval]) -> list[Interval]:
    """Every tile but the first starts one latent earlier, and fades in over it too."""
    return [
        tile._replace(start=tile.start - 1, left_ramp=tile.left_ramp + 1) if i else tile
        for i, tile in enumerate(tiles)
    ]


def to_frames_interval(tile: Interval, factor: int) -> Interval:
    """An interval of latent frames as one of pixel frames: the first latent is a single frame."""
    return Interval(
        tile.start * factor,
        1 + (tile.end - 1) * factor,
        1 + (tile.left_ramp - 1) * factor if tile.left_ramp else 0,
        tile.right_ramp * factor,
    )


def trapezoid(
    length: int, left_ramp: int, right_ramp: int, *, from_zero: bool, device: Any = None
) -> Tensor:
    """Weights (length,) that rise over the left ramp and fall over the right.

    Ramps leave out 0 and 1, but with `from_zero` the left one starts at 0 (and then rises in steps
    of 1/ramp): the first frame of a later tile in time is not used.
    """
    weights = torch.ones(length, device=device)
    k = torch.arange(left_ramp, device=device)
    weights[:left_ramp] = k / left_ramp if from_zero else (k + 1) / (left_ramp + 1)
    k = torch.arange(right_ramp, device=device)
    weights[length - right_ramp :] *= 1 - (k + 1) / (right_ramp + 1)
    return weights


def blend_weights(
    tiles: Iterable[Interval],
    *,
    from_zero: bool = False,
    fade: float = 1.0,  # share of a ramp, in its middle, over which the weight rises
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Each tile's weights, float32, scaled so that they sum to one at every position."""
    tiles = list(tiles)
    masks = [
        trapezoid(t.end - t.start, t.left_ramp, t.right_ramp, from_zero=from_zero, device=device)
        for t in tiles
    ]
    weights = _summing_to_one(tiles, masks)
    if fade == 1:
        return weights
    # Weights of two neighbours are as far from a half as each other, so they stay complements.
    steeper = [((weight - 0.5) / fade + 0.5).clamp(0, 1) for weight in weights]
    return _summing_to_one(tiles, steeper)


def _summing_to_one(tiles: list[Interval], masks: list[Tensor]) -> list[Tensor]:
    total = torch.zeros(tiles[-1].end, device=masks[0].device)
    for tile, mask in zip(tiles, masks, strict=True):
        total[tile.start : tile.end] += mask
    return [mask / total[tile.start : tile.end] for tile, mask in zip(tiles, masks, strict=True)]


def _with_ramps(bounds: list[tuple[int, int]]) -> list[Interval]:
    """Neighbouring tiles fade into each other over what they share."""
    shared = [0, *(end - start for (_, end), (start, _) in pairwise(bounds)), 0]
    return [Interval(*bounds[i], shared[i], shared[i + 1]) for i in range(len(bounds))]


def _check_encode_overlap(
    name: str, tiling: AxisTiling, spans: list[Span], factor: int, minimum: int
) -> None:
    if tiling is None or len(spans) == 1:
        return
    overlap = tiling.overlap * (factor if isinstance(tiling, ByCount) else 1)
    if overlap < minimum:
        raise InputError(
            f"encoding needs tiles that overlap by {minimum} or more in {name}; got {overlap}, "
            f"try {_round_up(minimum, factor)}"
        )


def _round_up(value: int, factor: int) -> int:
    return -(-value // factor) * factor
