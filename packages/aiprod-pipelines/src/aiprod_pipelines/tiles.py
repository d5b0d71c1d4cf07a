"""How large a piece of a clip the video decoder, or a second stage, gets at once.

Time is always tiled, so a longer clip needs no more memory and its first frames come early. Height
and width stay whole where the memory that is free allows it, because a whole picture has no seams;
else the largest of a few sizes that fits is taken.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from aiprod_core.components.tiled_model import tile_weights
from aiprod_core.errors import InputError
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_core.tiling import BySize, Tiling
from aiprod_core.types import ScaleFactors, VideoShape

# Overlaps below which no tile goes unless half of it is less: those of the published decoders.
OVERLAP_PIXELS, OVERLAP_FRAMES = 64, 24
# More is taken where the decoder sees further, in standard deviations of `decoder_spread`, up to a
# share of the tile that work allows. Tiles fade into each other in the middle half of it.
# benchmarks/tiling.py: with both, nano's tiles of 16 latents are within 45 dB of the whole.
OVERLAP_DEVIATIONS, OVERLAP_SHARE, FADE = 3.0, 1 / 3, 0.5
# In pixels and frames, rounded up to the VAE's grid.
LONG_SIDES = (1536, 1152, 768, 576, 384, 256)  # tried in turn where a whole picture is too much
TILE_FRAMES = (80, 48)
STREAMED_FRAMES = 48  # shorter, so that the first frames come early

# A decoder holds its widest features about this often at its peak: the input, a normalised, a
# padded and a converted copy, and the result of a convolution, and the residual. The most that was
# measured in float32 on a CPU, over layouts like the released one and like nano's.
LIVE_COPIES = 6
# A block of the transformer holds this many of its widths a token at its peak, modulation and
# feed-forward included; 34 to 41 were measured in float32 on a CPU.
LIVE_WIDTHS = 42
MIN_REFINE = 12  # latents; a smaller tile sees too little of the picture
USABLE = 0.7  # of the free memory; the rest is for what others allocate meanwhile


def choose_tiling(
    spec: str,  # "auto", "off" or WIDTHxHEIGHTxFRAMES: a request's `tile`
    config: VideoVAEConfig,
    scale: ScaleFactors,
    size: tuple[int, int, int],  # frames, height, width of the clip in pixels
    *,
    element_bytes: int,
    free_bytes: int,
    is_streamed: bool = False,
    at_once: int | None = None,  # latent frames that there are when a stream begins; None = all
) -> Tiling:
    """The tiling that `spec` asks for; "auto" looks at `free_bytes`, "off" decodes at once.

    Raises InputError for a size that is off the VAE's grid.
    """
    frames, height, width = size
    if spec == "off":
        return Tiling()
    axes = {
        name: partial(_axis, name, factor=factor, overlap=overlap, spread=spread)
        for name, factor, overlap, spread in zip(
            ("frames", "height", "width"),
            scale,
            (OVERLAP_FRAMES, OVERLAP_PIXELS, OVERLAP_PIXELS),
            decoder_spread(config),
            strict=True,
        )
    }
    if spec != "auto":
        tile_width, tile_height, tile_frames = (int(part) for part in spec.split("x"))
        tile = {"frames": tile_frames, "height": tile_height, "width": tile_width}
        return Tiling(**{name: axes[name](size) for name, size in tile.items()}, fade=FADE)
    lengths = TILE_FRAMES
    if is_streamed:
        there = STREAMED_FRAMES if at_once is None else max(at_once, 2) * scale.time
        lengths = (min(STREAMED_FRAMES, there),)
    for length in lengths:
        time = axes["frames"](_round_up(length, scale.time))
        for long_side in (None, *LONG_SIDES):
            tile_height, tile_width = _scaled(height, width, long_side, scale)
            needed = decode_bytes(
                config,
                # A tile starts one latent earlier than it counts.
                min(frames, time.size + scale.time),
                min(height, tile_height),
                min(width, tile_width),
                element_bytes,
            )
            is_last = length == lengths[-1] and long_side == LONG_SIDES[-1]
            if needed <= USABLE * free_bytes or is_last:
                tiling = Tiling(frames=time, fade=FADE)
                if long_side is None:
                    return tiling
                return replace(
                    tiling,
                    height=axes["height"](tile_height),
                    width=axes["width"](tile_width),
                )
    raise AssertionError("the last size is always taken")


def decoder_spread(config: VideoVAEConfig) -> tuple[float, float, float]:
    """How far a pixel depends on its surroundings in time, height and width, in latents.

    The standard deviation of what an impulse spreads to, were all convolutions plain means of
    three. Attention over a frame has no such bound and is left out.
    """
    unit = torch.ones(3)  # of a step in the current resolution, in latents
    variance = torch.full((3,), MEAN_OF_3)  # the first convolution
    for block in reversed(config.decoder_blocks):
        convolutions = {"res_x": 2 * block.num_layers, "res_x_y": 2, "attn": 0}.get(block.name, 1)
        variance += convolutions * MEAN_OF_3 * unit.square()
        unit /= torch.tensor(block.stride)
    variance += MEAN_OF_3 * unit.square()  # the last
    time, height, width = variance.sqrt().tolist()
    return time, height, width


MEAN_OF_3 = 2 / 3  # the variance of a mean of three neighbours, in steps


def decode_bytes(
    config: VideoVAEConfig, frames: int, height: int, width: int, element_bytes: int
) -> int:
    """About what decoding a tile of this many pixels needs at its peak, weights apart."""
    cells = float(frames * height * width)
    # From the pixels' side inwards: `channels` at one cell in `stride`.
    stride, channels = config.patch_size**2, config.decoder_base_channels
    widest = max(config.out_channels, channels / stride)
    for block in config.decoder_blocks:  # stored pixel side first
        time, rows, columns = block.stride
        stride *= time * rows * columns
        if block.name not in ("res_x", "attn"):
            channels *= block.multiplier
        widest = max(widest, channels / stride)
    return round(LIVE_COPIES * widest * cells * element_bytes)


def choose_refine_tile(
    spec: str,  # "auto", "off" or WIDTHxHEIGHT: a request's `refine_tile`
    width: int,  # of the transformer's stream
    scale: ScaleFactors,
    size: tuple[int, int, int],  # frames, height, width of the clip in pixels
    *,
    element_bytes: int,
    free_bytes: int,
) -> str:
    """ "off" or WIDTHxHEIGHT: the fewest tiles whose activations fit the free memory.

    Raises InputError for a size that is off the VAE's grid.
    """
    frames, height, breadth = size
    if spec == "off":
        return spec
    if spec != "auto":
        tile = [int(part) for part in spec.split("x")]
        for name, side, factor in zip(("width", "height"), tile, scale[:0:-1], strict=True):
            _axis(name, side, factor=factor, overlap=factor)
        return spec
    picture = height // scale.height, breadth // scale.width
    per_place = ((frames - 1) // scale.time + 1) * width * LIVE_WIDTHS * element_bytes
    tile, count = picture, 1
    while tile[0] * tile[1] * per_place > USABLE * free_bytes and max(tile) > MIN_REFINE:
        count += 1  # to a side, each sharing a quarter of itself with the next
        tile = tuple(max(min(side, MIN_REFINE), -(-4 * side // (3 * count))) for side in picture)
    if tile == picture:
        return "off"
    return f"{tile[1] * scale.width}x{tile[0] * scale.height}"


def refine_tiles(spec: str, scale: ScaleFactors, shape: VideoShape) -> Tensor | None:
    """The weights (tiles, H, W) of a chosen `refine_tile`; None for the whole picture.

    Tiles share a quarter of themselves with the next.
    """
    if spec == "off":
        return None
    tile_width, tile_height = (int(part) for part in spec.split("x"))
    tile = tile_height // scale.height, tile_width // scale.width
    overlap = max(1, tile[0] // 4), max(1, tile[1] // 4)
    return tile_weights((shape.height // scale.height, shape.width // scale.width), tile, overlap)


def free_memory(device: torch.device, max_bytes: int | None = None) -> int:
    """Bytes that can still be allocated: on the GPU, or in main memory within the process's limit.

    Memory that PyTorch has reserved on a GPU and does not use counts as free. `max_bytes` is what
    the process may hold in all.
    """
    if max_bytes is not None:
        is_cuda = device.type == "cuda"
        held = (
            torch.cuda.memory_allocated(device) if is_cuda else psutil.Process().memory_info().rss
        )
        return max(0, min(free_memory(device), max_bytes - held))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return min(psutil.virtual_memory().available, _free_in_cgroup())


def _free_in_cgroup() -> int:
    """What the container's limit leaves; no limit is a very large number."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # another kind of cgroup, or "max"
        return sys.maxsize


def _axis(name: str, size: int, *, factor: int, overlap: int, spread: float = 0.0) -> BySize:
    """Tiles of `size` that overlap by `overlap`, or as far as the decoder sees; by half at most."""
    if size % factor or size < 2 * factor:
        nearest = max(2, round(size / factor)) * factor
        raise InputError(
            f"tile {name} must be a multiple of {factor}, at least {2 * factor}; got {size}, "
            f"try {nearest}."
        )
    latents = size // factor
    seen = min(math.ceil(OVERLAP_DEVIATIONS * spread), int(latents * OVERLAP_SHARE))
    return BySize(size, factor * min(max(seen, -(-overlap // factor)), latents // 2))


def _scaled(height: int, width: int, long_side: int | None, scale: ScaleFactors) -> tuple[int, int]:
    """The picture's proportions with this long side, in whole latents."""
    if long_side is None:
        return height, width
    ratio = long_side / max(height, width)
    sides = (
        max(2, round(side * ratio / factor)) * factor
        for side, factor in ((height, scale.height), (width, scale.width))
    )
    return tuple(sides)  # pyright: ignore[reportReturnType]


def _round_up(value: int, factor: int) -> int:
    return -(-value // factor) * factor
