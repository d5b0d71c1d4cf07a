"""Faults of a picture that can be seen without knowing what it should show.

Frames are uint8 or float 0..255, (F, H, W, 3); levels are those of 8-bit pixels.

Shapes: F frames, H height, W width.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import ndimage

BLOCKS = 8  # a picture is compared in 8 x 8 parts


@dataclass(frozen=True)
class Span:
    """From `start_s` to `end_s`, in seconds from the start of the clip."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Seam:
    """The strongest straight edge from border to border: between `position - 1` and `position`.

    `axis` is "column" (the line is vertical) or "row"; `levels` is by how much its two sides
    differ in brightness (the median along it) beyond what the lines beside it do.
    """

    axis: str
    position: int
    levels: float


def flicker(frames: np.ndarray) -> float:
    """Amplitude in levels by which brightness alternates from frame to frame.

    The mean of |a - 2 b + c| / 4 over three neighbouring frames, of the median over the picture's
    parts, so that what moves before a steady background does not count.
    """
    if len(frames) < 3:
        return 0.0
    parts = _block_means(_luma(frames))
    return float(np.median(np.abs(np.diff(parts, 2, axis=0)), axis=(1, 2)).mean() / 4)


def changes(frames: np.ndarray) -> np.ndarray:
    """How much each frame differs from the one before, (F - 1,): the mean absolute difference in
    levels of the part of the picture that changes most."""
    luma = _luma(frames)
    return np.array([_block_means(np.abs(b - a)[None]).max() for a, b in pairwise(luma)])


def frozen_spans(
    frames: np.ndarray, fps: float, *, threshold: float = 0.5, min_s: float = 0.25
) -> tuple[Span, ...]:
    """Spans in which no part of the picture changes by `threshold` levels from frame to frame.

    A span lasts from the first of the equal frames to the end of the last. What rests by right
    (an object that has come to lie) is frozen too.
    """
    still = changes(frames) < threshold
    spans = [Span(start / fps, (stop + 1) / fps) for start, stop in runs(still)]
    return tuple(span for span in spans if span.duration_s >= min_s)


def empty_spans(frames: np.ndarray, fps: float, *, threshold: float = 3.0) -> tuple[Span, ...]:
    """Spans of frames that show nothing: one even tone (grey, black or any other), whose pixels
    deviate by less than `threshold` levels."""
    spread = frames.reshape(len(frames), -1, 3).astype(np.float32).std(axis=1)
    return _spans((spread < threshold).all(axis=1), fps)


def black_spans(frames: np.ndarray, fps: float, *, threshold: float = 12.0) -> tuple[Span, ...]:
    """Spans of frames of which all but a hundredth of the pixels are darker than `threshold`."""
    bright = _luma(frames).reshape(len(frames), -1) >= threshold
    return _spans(bright.mean(axis=1) < 0.01, fps)


def nonfinite_spans(frames: np.ndarray, fps: float) -> tuple[Span, ...]:
    """Spans of float frames that hold a NaN or an infinity; no uint8 frame does."""
    return _spans(np.array([not np.isfinite(frame).all() for frame in frames]), fps)


def cuts(frames: np.ndarray, fps: float, *, factor: float = 4.0) -> tuple[float, ...]:
    """Times in seconds of jumps: frames that differ from the one before, over the whole picture,
    `factor` times as much as the frames around do, but for one of them, and by 4 levels at least.
    """
    luma = _luma(frames)
    change = np.array([np.median(_block_means(np.abs(d)[None])) for d in np.diff(luma, axis=0)])
    found = []
    for index, value in enumerate(change):
        around = np.delete(change[max(index - 4, 0) : index + 5], min(index, 4))
        if value > 4 and value > factor * np.sort(around)[-2:].min(initial=np.inf):
            found.append((index + 1) / fps)
    return tuple(found)


def seam(frames: np.ndarray) -> Seam | None:
    """The strongest seam, as between decoded tiles; None in pictures under 8 pixels.

    What is built like one counts as one: a level horizon is a row seam.
    """
    luma = _luma(frames)
    if min(luma.shape[1:]) < 8:
        return None
    found = []
    for axis, name in ((2, "column"), (1, "row")):
        steps = np.diff(luma.mean(axis=0), axis=axis - 1)  # what stays in place over time
        step = np.median(steps, axis=2 - axis)  # (W - 1,) or (H - 1,)
        excess = np.abs(step - ndimage.median_filter(step, 5, mode="nearest"))
        found.append(Seam(name, int(excess.argmax()) + 1, float(excess.max())))
    return max(found, key=lambda s: s.levels)


def seam_spans(
    frames: np.ndarray, fps: float, *, threshold: float = 8.0, min_frames: int = 3
) -> tuple[Span, ...]:
    """Spans in which a seam of `threshold` levels stays at one line for `min_frames` or longer.

    A row counts only beyond what it has in the frames where it has least, of those that show
    something: a horizon is no seam, nor is a row seam that lasts all through.
    """
    luma = _luma(frames)
    shown = luma.std(axis=(1, 2)) >= 3
    if min(luma.shape[1:]) < 8 or not shown.any():
        return ()
    found = np.zeros(len(frames), dtype=bool)
    for axis in (2, 1):
        step = np.median(np.diff(luma, axis=axis), axis=3 - axis)  # (F, W - 1) or (F, H - 1)
        excess = np.abs(step - ndimage.median_filter(step, (1, 5), mode="nearest"))
        if axis == 1:
            # What passes before a horizon changes it a little.
            excess = excess - 1.5 * excess[shown].min(axis=0)
        for line in (excess > threshold).T:
            for start, stop in runs(line):
                found[start:stop] |= stop - start >= min_frames
    return _spans(found, fps)


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _spans(mask: np.ndarray, fps: float) -> tuple[Span, ...]:
    return tuple(Span(start / fps, stop / fps) for start, stop in runs(mask))


def _luma(frames: np.ndarray) -> np.ndarray:
    """Brightness in levels, float32 (F, H, W), by the weights of BT.709."""
    return frames.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def _block_means(planes: np.ndarray) -> np.ndarray:
    """Means of `BLOCKS` x `BLOCKS` parts of (F, H, W) planes; fewer parts in tiny pictures."""
    rows, columns = (np.unique(np.linspace(0, n, BLOCKS, False, dtype=int))
                     for n in planes.shape[1:])  # fmt: skip
    sums = np.add.reduceat(np.add.reduceat(planes, rows, axis=1), columns, axis=2)
    heights = np.diff([*rows, planes.shape[1]])
    widths = np.diff([*columns, planes.shape[2]])
    return sums / (heights[:, None] * widths)
