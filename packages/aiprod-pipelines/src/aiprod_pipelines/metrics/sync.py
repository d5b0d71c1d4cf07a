"""How far sound and picture lie apart: the shift at which seen events meet heard ones best.

Events have times in seconds and weights. Heard events are the peaks of `sound.onset_strength`; seen
ones are sudden changes of motion, for which a clip of unknown content gives a rough signal
(`motion_events`) and a known world exact times (the trainer's judge).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from scipy import signal

from aiprod_pipelines.media import Audio
from aiprod_pipelines.metrics.motion import STILL, optical_flow
from aiprod_pipelines.metrics.sound import onset_strength

MAX_OFFSET_S = 0.5
STEP_S = 0.001
IN_PLACE_S = 0.1


class Events(NamedTuple):
    """Times in seconds and weights (how sudden, >= 0) of what happens within `duration_s`."""

    times_s: np.ndarray
    weights: np.ndarray
    duration_s: float

    @classmethod
    def at(cls, times_s: tuple[float, ...], duration_s: float) -> "Events":
        """Events of equal weight."""
        return cls(np.asarray(times_s, float), np.ones(len(times_s)), duration_s)


@dataclass(frozen=True)
class Offset:
    """`ms` is positive where the sound comes late. `score` is the share of events, by weight, that
    meet a partner at this shift, 0 to 1: a low one means that sound and picture hardly know each
    other. `in_place` is the highest within 100 ms of no shift: what comes again and again meets
    partners at many shifts."""

    ms: float
    score: float
    in_place: float


def av_offset(
    frames: np.ndarray,
    fps: float,
    audio: Audio,
    max_offset_s: float = MAX_OFFSET_S,
    *,
    flow: np.ndarray | None = None,
) -> Offset | None:
    """The offset of a clip of any content; None where nothing happens in picture or sound.

    What repeats evenly (footsteps) is only known up to its period. A flow that was measured already
    may be given.
    """
    tolerance_s = max(0.03, 0.6 / fps)
    flow = optical_flow(frames) if flow is None else flow
    seen, heard = motion_events(flow, fps), sound_events(audio)
    return best_offset(seen, heard, tolerance_s, max_offset_s)


def best_offset(
    seen: Events, heard: Events, tolerance_s: float = 0.03, max_offset_s: float = MAX_OFFSET_S
) -> Offset | None:
    """Normalised cross-correlation of two trains of events, each smeared by `tolerance_s`.

    An event without a partner costs, unless its partner would lie outside the clip. None without
    events on either side, or where no two of them come within `max_offset_s`.
    """
    if not len(seen.times_s) or not len(heard.times_s):
        return None
    lags = np.arange(-max_offset_s, max_offset_s + STEP_S / 2, STEP_S)
    apart = heard.times_s[None] - seen.times_s[:, None]  # (seen, heard)
    near = np.exp(-0.5 * np.square((apart[None] - lags[:, None, None]) / tolerance_s))
    met = np.einsum("s,lsh,h->l", seen.weights, near, heard.weights)

    def power(events: Events, shift: np.ndarray, until_s: float) -> np.ndarray:
        """Weight of the events whose partner lies within the other track, for each lag."""
        partner = events.times_s[None] + shift[:, None]
        # An event at the border, whose partner may just miss it, counts by half.
        inside = np.clip(np.minimum(partner, until_s - partner) / (2 * tolerance_s) + 0.5, 0, 1)
        return inside @ np.square(events.weights)

    own = np.sqrt(power(seen, lags, heard.duration_s) * power(heard, -lags, seen.duration_s))
    # Lags at which hardly anything overlaps must not win by the little that does.
    floor = 0.25 * np.linalg.norm(seen.weights) * np.linalg.norm(heard.weights)
    score = met / np.maximum(own, floor)
    best = int(score.argmax())
    if score[best] < 1e-3:
        return None
    in_place = score[np.abs(lags) <= IN_PLACE_S].max()
    return Offset(float(lags[best] * 1000), float(min(score[best], 1.0)), float(min(in_place, 1.0)))


def sound_events(audio: Audio) -> Events:
    """Peaks of the onset strength that reach a quarter of the highest, 0.1 s apart."""
    step_s = 0.005
    strength = onset_strength(audio, step_s)
    if strength.max(initial=0.0) < 1e-3:
        return Events(np.zeros(0), np.zeros(0), audio.duration_s)
    peaks, _ = signal.find_peaks(
        np.pad(strength, 1), height=0.25 * strength.max(), distance=round(0.1 / step_s)
    )
    weights = np.sqrt(strength[peaks - 1] / strength.max())
    return Events((peaks - 1) * step_s, weights, audio.duration_s)


def motion_events(flow: np.ndarray, fps: float) -> Events:
    """Frames, weighted by how suddenly what moves changes its velocity there, from optical flow.

    The change is that of the flow along its own path, averaged over what moves; a steady
    acceleration (a fall) is no event, so the median change is taken off.
    """
    duration_s = (len(flow) + 1) / fps
    nothing = Events(np.zeros(0), np.zeros(0), duration_s)
    if len(flow) < 3:
        return nothing
    change = np.array([_change(a, b) for a, b in pairwise(flow)])  # at frames 1 to F - 2
    change = np.maximum(change - np.median(change), 0)
    if change.max() < STILL:
        return nothing
    weights = np.where(change > 0.2 * change.max(), change / change.max(), 0)
    return Events(np.arange(1, len(change) + 1) / fps, weights, duration_s)


def _change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean change of velocity, in frame widths per frame, of what moves in one of two steps."""
    height, width = before.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    there = before * np.float32(width)  # pixels
    carried = cv2.remap(after, x + there[..., 0], y + there[..., 1], cv2.INTER_LINEAR)
    speeds = np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
    moving = np.maximum(*speeds) > STILL
    change = np.linalg.norm(carried - before, axis=-1)
    return float(change[moving].mean()) if moving.any() else 0.0
