"""Where keyframes and tiles lie in the DFR pipeline (2.5.1), which doubles a clip's frame rate.

The clip is generated on a canvas cut into segments, with a keyframe at the end of each. A round
doubles time: the canvas and with it every keyframe position. Then tiles of whole segments are
refined one by one; a tile keeps the known keyframes it touches and generates a new one in the
middle of each segment, so that after the round the segments are as long as before.

Positions are in pixel frames; the latent frame of position p (a multiple of 8) is p / 8.
"""

from dataclasses import dataclass
from itertools import pairwise

from aiprod_core.errors import InputError

SEGMENTS = (24, 32)
TIME_SCALE = 8


@dataclass(frozen=True)
class Canvas:
    """`positions` are the keyframes, at the end of each segment; the last is the last frame."""

    num_frames: int
    segment: int
    positions: tuple[int, ...]

    def doubled(self) -> "Canvas":
        """The canvas of the next round before its new keyframes: twice the segment, as many."""
        positions = tuple(2 * position for position in self.positions)
        return Canvas(doubled_frames(self.num_frames), 2 * self.segment, positions)

    def with_midpoints(self) -> "Canvas":
        """The canvas after the round: half the segment, a keyframe in the middle of each too."""
        middles = (position - self.segment // 2 for position in self.positions)
        positions = tuple(sorted({*self.positions, *middles}))
        return Canvas(self.num_frames, self.segment // 2, positions)


@dataclass(frozen=True)
class Tile:
    """A stretch of the canvas that is refined on its own.

    Pixels go from `start` to `end` (both keyframes or the ends of the clip), latents in
    [`latent_start`, `latent_end`). `anchors` are known keyframes, `slots` new ones. The first
    `drop_latents` latents repeat the tile before and are cut when tiles are joined.
    """

    start: int
    end: int
    latent_start: int
    latent_end: int
    anchors: tuple[int, ...]
    slots: tuple[int, ...]
    drop_latents: int


def canvas_for(num_frames: int, segments: tuple[int, ...] = SEGMENTS) -> Canvas:
    """The canvas of whole segments that holds `num_frames`: least padding, then longer segments.

    Raises InputError for a single frame, which has no segment.
    """
    if num_frames < 2:
        raise InputError(f"num_frames must be at least 2 to double a clip; got {num_frames}, try 9")

    def length(segment: int) -> int:
        return -(-(num_frames - 1) // segment) * segment

    segment = min(segments, key=lambda segment: (length(segment), -segment))
    end = length(segment)
    return Canvas(end + 1, segment, tuple(range(segment, end + 1, segment)))


def doubled_frames(num_frames: int) -> int:
    """Frames after one doubling of time: those in between are new, the ends stay."""
    return 2 * (num_frames - 1) + 1


def temporal_tiles(positions: tuple[int, ...], count: int) -> list[Tile]:
    """Splits the segments that end at `positions` into at most `count` tiles.

    The first tiles take what does not divide evenly. Every tile but the first starts one segment
    early and drops that lead-in and the latent of the seam, which the tile before already has.
    """
    segments = list(pairwise((0, *positions)))
    count = min(count, len(segments))
    share, longer = divmod(len(segments), count)
    tiles, first = [], 0
    for index in range(count):
        last = first + share + (index < longer)
        lead_in = 1 if index else 0
        covered = segments[first - lead_in : last]
        start, end = covered[0][0], covered[-1][1]
        drop = (segments[first][0] - start) // TIME_SCALE + 1 if lead_in else 0
        tiles.append(
            Tile(
                start=start,
                end=end,
                latent_start=start // TIME_SCALE,
                latent_end=end // TIME_SCALE + 1,
                anchors=tuple(p for p in positions if start <= p <= end),
                slots=tuple((left + right) // 2 for left, right in covered),
                drop_latents=drop,
            )
        )
        first = last
    return tiles
