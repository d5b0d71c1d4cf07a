"""What can be seen in a clip, measured without a network: stage, camera, colours, track, shape,
motion and the times of events.

The picture is explained as one of the known backdrops under one of the camera moves, plus one or
two objects of known colours. That gives soft masks, hence tracks, areas and outlines. Impacts are
the cusps of a track (two free flights that meet at the floor), pulses the humps of the area,
footsteps the times when the legs are widest apart; all are timed between frames.

Shapes: F frames, S = SIDE pixels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from aiprod_core.errors import InputError
from aiprod_trainer.world.camera import CAMERAS, View, view
from aiprod_trainer.world.render import backdrop, signed_distance
from aiprod_trainer.world.scene import (
    ALL_BACKGROUNDS,
    COLOURS,
    FIGURE,
    GRAVITY,
    PULSE_S,
    SHAPES,
    SIZES,
    STRIDE_RATE,
    lab,
    visible_colours,
)

SIDE = 64  # pictures are measured at this size
EXPLAINED = 45  # a pixel this near (in RGB) to a known thing belongs to it


@dataclass(frozen=True, eq=False)
class Track:
    """Where an object is in each frame; nan where none was found.

    Lengths are in frame widths of a camera at rest: the camera's own move is taken out.
    `spread` is the standard deviation of the object's pixels along x. `coherence` is the mean
    share of the object's pixels that lie in one piece: an object in two places at once, or in
    none, lowers it.
    """

    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    spread: np.ndarray
    coherence: float

    @property
    def largest_jump(self) -> float:
        """Longest way between two frames (a true fall covers up to 0.19 in a frame)."""
        steps = np.hypot(np.diff(self.x), np.diff(self.y))
        return float(np.nanmax(steps, initial=0.0))


@dataclass(frozen=True, eq=False)
class Sight:
    """All that is seen. `second_colour` is None when there is one object;"""

    background: str
    camera: str
    colour: str
    second_colour: str | None
    shape: str
    size: str
    motion: str
    seen_s: tuple[float, ...]
    track: Track


def look(frames: np.ndarray, fps: float) -> Sight:
    """Measures uint8 or float 0..255 frames (F, size, size, 3)."""
    picture = _to_side(frames)
    background, camera, stage, seen = _find_stage(picture)
    from_stage = _from_stage(picture, stage)
    colour = _find_colour(picture[from_stage > EXPLAINED], picture, background)
    to_object = _to_paint(picture, colour)
    second = _find_second(picture, from_stage, to_object, background, colour)
    other = None
    if second is not None:
        to_second = _to_paint(picture, second)
        other, _ = _follow(_share(np.minimum(from_stage, to_object), to_second))
        other = _at_rest(other, seen)
        from_stage = np.minimum(from_stage, to_second)  # whatever is not the first object
    screen, kept = _follow(_share(from_stage, to_object))
    track = _at_rest(screen, seen)
    shape, turned = _find_shape(kept, screen)
    motion = _find_motion(track, shape, turned, other)
    return Sight(
        background=background,
        camera=camera,
        colour=colour,
        second_colour=second,
        shape=shape,
        size=_find_size(track, shape),
        motion=motion,
        seen_s=_seen_events(track, other, motion, fps),
        track=track,
    )


def _to_side(frames: np.ndarray) -> np.ndarray:
    """Float32 pictures of the judge's size, by averaging blocks of pixels."""
    picture = frames.astype(np.float32)
    factor, rest = divmod(frames.shape[1], SIDE)
    if factor == 0 or rest:
        raise InputError(f"frames must be a multiple of {SIDE} pixels wide; got {frames.shape[1]}")
    count = len(frames)
    return picture.reshape(count, SIDE, factor, SIDE, factor, 3).mean(axis=(2, 4))


AMOUNTS = (0.25, 0.5, 0.75, 1.0, 1.25)  # shares of a camera's whole move that are tried
PROBES = 5  # frames that the camera is found from


def _find_stage(picture: np.ndarray) -> tuple[str, str, np.ndarray, View]:
    """The backdrop and camera move that explain the picture best: (name, camera, stage, view).

    The middle frame, which all moves share, ranks the backdrops; the move is tried on the best.
    """
    count = len(picture)
    middle = picture[count // 2]

    def off_middle(name: str) -> float:
        return float(np.abs(middle - _stage(name, "static", 0.0, 1)[0]).clip(0, 60).mean())

    ranked = sorted(ALL_BACKGROUNDS, key=off_middle)
    at = np.round(np.linspace(0, count - 1, PROBES)).astype(int)
    probes = picture[at][:, ::2, ::2]
    best, best_error = (ranked[0], "static", 0.0), np.inf
    for name in ranked[:3]:
        for camera in CAMERAS:
            for amount in AMOUNTS if camera != "static" else (0.0,):
                tried = _stage(name, camera, amount, PROBES)[:, ::2, ::2]
                error = float(np.abs(probes - tried).clip(0, 60).mean())
                # A move must explain clearly more than standing still does.
                error = error if camera == "static" else 1.06 * error + 0.1
                if error < best_error:
                    best, best_error = (name, camera, amount), error
    name, camera, amount = best
    stage = _stage(name, camera, amount, count)
    seen = view(camera, np.linspace(0, 1, count), amount)
    return name, camera if amount >= 0.5 else "static", stage, seen


@lru_cache(maxsize=512)
def _stage(background: str, camera: str, amount: float, count: int) -> np.ndarray:
    return backdrop(background, SIDE, view(camera, np.linspace(0, 1, count), amount))


def _find_colour(pixels: np.ndarray, picture: np.ndarray, background: str) -> str:
    """Most frequent palette colour among pixels that nothing else explains."""
    if len(pixels) < 20:  # nothing there: any answer is a guess, so the whole picture votes
        pixels = picture.reshape(-1, 3)[::7]
    names = list(visible_colours(background))
    palette = np.array([COLOURS[name] for name in names])
    distance = np.linalg.norm(lab(pixels[::3])[:, None] - lab(palette), axis=-1)
    votes = np.bincount(distance.argmin(1), minlength=len(names))
    return names[int(votes.argmax())]


def _find_second(
    picture: np.ndarray,
    from_stage: np.ndarray,
    to_object: np.ndarray,
    background: str,
    colour: str,
) -> str | None:
    """The colour of a second object; thin leftovers (ropes, edges) and highlights within the
    first object do not count as one."""
    first = _share(from_stage, to_object) > 0.5
    filled = np.array([ndimage.binary_fill_holes(frame) for frame in first], dtype=bool)
    plain = np.linalg.norm(picture - np.array(COLOURS[colour], np.float32), axis=-1)
    left = (from_stage > EXPLAINED) & (plain > 2 * EXPLAINED) & ~(filled & (to_object < EXPLAINED))
    left = np.asarray(ndimage.binary_opening(left, np.ones((1, 3, 3))), dtype=bool)
    if np.mean(left.sum((1, 2)) > 16) < 0.7:
        return None
    second = _find_colour(picture[left], picture, background)
    return second if second != colour else None


def _from_stage(picture: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Distance of each pixel from the backdrop in any shade down to the darkest shadow."""
    # |p - s b|^2 = p.p - 2 s p.b + s^2 b.b, with the products computed once.
    across = np.einsum("fhwc,fhwc->fhw", picture, np.broadcast_to(stage, picture.shape))
    power = np.einsum("fhwc,fhwc->fhw", stage, stage)
    nearest = np.full(picture.shape[:3], np.inf, dtype=np.float32)
    for shade in (1.0, 0.88, 0.76, 0.64):
        np.minimum(nearest, shade * (shade * power - 2 * across), out=nearest)
    return _root(picture, nearest)


def _to_paint(picture: np.ndarray, colour: str) -> np.ndarray:
    """Distance of each pixel from a paint in any light, (F, S, S)."""
    paint = np.array(COLOURS[colour], dtype=np.float32)
    nearest = np.full(picture.shape[:3], np.inf, dtype=np.float32)
    for shade in (0.7, 0.85, 1.0):
        for gloss in (0.0, 0.3, 0.6):
            tone = paint * shade + (255 - paint * shade) * gloss
            np.minimum(nearest, tone @ tone - 2 * (picture @ tone), out=nearest)
    return _root(picture, nearest)


def _root(picture: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Distances from the part of their squares that does not depend on the pixel alone."""
    power = np.einsum("fhwc,fhwc->fhw", picture, picture)
    return np.sqrt(np.maximum(power + rest, 0.0))


def _share(from_stage: np.ndarray, to_object: np.ndarray) -> np.ndarray:
    """How much more each pixel looks like the object than like the backdrop, in [0, 1]."""
    return from_stage / (from_stage + to_object + 1e-3)


def _follow(mask: np.ndarray) -> tuple[Track, np.ndarray]:
    """Track of the largest piece in each frame, and the mask without the other pieces."""
    count = len(mask)
    x, y, area, spread = (np.full(count, np.nan) for _ in range(4))
    kept = np.zeros_like(mask)
    share = np.zeros(count)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    for frame in range(count):
        labels = np.zeros((SIDE, SIDE), dtype=np.int32)
        if not ndimage.label(mask[frame] > 0.5, output=labels):
            continue
        sizes = np.bincount(labels.ravel())[1:]
        largest = labels == 1 + sizes.argmax()
        share[frame] = sizes.max() / sizes.sum()
        near = ndimage.binary_dilation(largest)
        kept[frame] = np.where(near, np.clip((mask[frame] - 0.2) / 0.6, 0, 1), 0)
        area[frame] = kept[frame].sum() / SIDE**2
        if sizes.max() >= 12:
            weight = kept[frame] / kept[frame].sum()
            x[frame] = (weight * columns).sum() / SIDE
            y[frame] = (weight * rows).sum() / SIDE
            spread[frame] = np.sqrt((weight * np.square(columns / SIDE - x[frame])).sum())
    return Track(x, y, area, spread, float(share.mean())), kept


def _at_rest(screen: Track, seen: View) -> Track:
    """The track as a camera at rest would see it."""
    x, y = seen.to_world(screen.x, screen.y)
    area, spread = screen.area / seen.zoom**2, screen.spread / seen.zoom
    return Track(x, y, area, spread, screen.coherence)


TURNS = np.arange(24) * (2 * np.pi / 24)


def _find_shape(mask: np.ndarray, track: Track) -> tuple[str, bool]:
    """The outline that overlaps best with the mask, and whether it fits much better turned."""
    frames = np.flatnonzero(np.isfinite(track.x))[::3]
    if not len(frames):
        return SHAPES[0], False
    if _is_tall(mask[frames]):
        return FIGURE, False
    upright = {
        shape: np.mean([_overlap(shape, 0.0, mask[f], track, f) for f in frames])
        for shape in SHAPES
    }
    best = max(upright, key=upright.__getitem__)
    if upright[best] > 0.9:
        return best, False
    turned = {
        shape: np.mean([max(_overlap(shape, a, mask[f], track, f) for a in TURNS) for f in frames])
        for shape in SHAPES
    }
    best_turned = max(turned, key=turned.__getitem__)
    if turned[best_turned] > upright[best] + 0.05:
        return best_turned, True
    return best, False


def _is_tall(mask: np.ndarray) -> bool:
    """Whether the mask is far higher than wide, as only the figure is."""
    along = np.arange(SIDE)
    ratios = []
    for frame in mask:
        columns, rows = frame.sum(0), frame.sum(1)
        spans = [
            np.sqrt((w * np.square(along - (w * along).sum() / w.sum())).sum() / w.sum())
            for w in (columns, rows)
        ]
        ratios.append(spans[1] / max(spans[0], 1e-3))
    return float(np.median(ratios)) > 1.55


def _overlap(shape: str, angle: float, mask: np.ndarray, track: Track, frame: int) -> float:
    """Intersection over union of a mask and a shape with the same centroid and area."""
    unit_area, shift = _outline(shape)
    radius = np.sqrt(track.area[frame] / unit_area) * SIDE
    half = int(1.5 * radius) + 2
    cx, cy = track.x[frame] * SIDE, track.y[frame] * SIDE
    columns = np.arange(max(int(cx) - half, 0), min(int(cx) + half, SIDE))
    rows = np.arange(max(int(cy) - half, 0), min(int(cy) + half, SIDE))
    x, y = np.meshgrid((columns + 0.5 - cx) / radius, -(rows + 0.5 - cy) / radius)
    c, s = np.cos(angle), np.sin(angle)
    distance = signed_distance(shape, c * x - s * y, s * x + c * y + shift)
    cover = np.clip(0.5 - distance * radius, 0, 1)
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    both = np.minimum(cover, part).sum()
    return float(both / (cover.sum() + mask.sum() - both))


@lru_cache
def _outline(shape: str) -> tuple[float, float]:
    """Area of the shape of radius 1 and height of its centroid."""
    steps = np.linspace(-1.3, 1.3, 521)
    inside = signed_distance(shape, *np.meshgrid(steps, steps)) < 0
    height = float((inside.mean(1) * steps).sum() / inside.mean(1).sum())
    return float(inside.mean() * 2.6**2), height


def _find_size(track: Track, shape: str) -> str:
    found = track.area[np.isfinite(track.area)]
    if not len(found):
        return "small"
    # A pulsing object is at rest most of the time: the lower half is its own size.
    if shape == FIGURE:  # its outline is largest with the legs apart
        area = float(np.quantile(found, 0.8))
        return min(SIZES, key=lambda name: abs(_figure_area(name) - area))
    radius = np.sqrt(np.quantile(found, 0.25) / _outline(shape)[0])
    return min(SIZES, key=lambda name: abs(SIZES[name] - radius))


FIGURE_AREA = 0.211  # with the legs apart, over the height squared; measured on renders


def _figure_area(size: str) -> float:
    """The area of a figure of this size."""
    return FIGURE_AREA * (0.26 + SIZES[size]) ** 2


def _find_motion(track: Track, shape: str, turned: bool, other: Track | None) -> str:
    found = np.isfinite(track.x)
    if found.sum() < 5:
        return "still"
    x, y, scale = track.x[found], track.y[found], np.sqrt(track.area[found])
    fifth = max(len(x) // 5, 1)
    way = np.median(x[-fifth:]) - np.median(x[:fifth])
    if shape == FIGURE:
        return "still" if abs(way) < 0.15 else "walk right" if way > 0 else "walk left"
    if other is not None and np.ptp(x) > 0.05:
        return "collide"
    smooth = ndimage.uniform_filter1d(x, 3)
    if np.ptp(x) > 0.18 and np.abs(np.diff(smooth)).sum() > 1.4 * abs(way):
        return "pendulum"
    if abs(way) > 0.2:
        return "roll right" if way > 0 else "roll left"
    if np.ptp(y) > 0.14:
        lowest = y.max()
        landed = int(np.argmax(y > lowest - 0.05))
        rises = lowest - y[landed:].min() > 0.25 * np.ptp(y)
        return "bounce" if rises else "fall"
    if turned:
        return "spin"
    swollen = np.quantile(scale, 0.95) / np.quantile(scale, 0.1)
    return "pulse" if swollen > 1.15 else "still"


def _seen_events(track: Track, other: Track | None, motion: str, fps: float) -> tuple[float, ...]:
    if motion in ("bounce", "fall"):
        return _impacts_seen(track.y, fps)
    if motion == "pulse":
        return _pulses_seen(np.sqrt(track.area), fps)
    if motion == "pendulum":
        return _swings_seen(track.x, fps)
    if motion in ("walk left", "walk right"):
        return _steps_seen(track.spread, fps)
    if motion == "collide" and other is not None and np.isfinite(other.x).sum() > 4:
        return _clash_seen(track.x, other.x, fps)
    return ()


def _impacts_seen(y: np.ndarray, fps: float) -> tuple[float, ...]:
    """Times at which two free flights meet at the floor, by least squares around each low point."""
    y = _filled(y)
    times = np.arange(len(y)) / fps
    floor = np.quantile(y, 0.98)
    low = [
        k
        for k in range(1, len(y) - 1)
        if y[k] >= y[k - 1] and y[k] > y[k + 1] - 0.004 and y[k] > floor - 0.12
        and y[k] - y[max(k - 2, 0) : k].min() > 0.015
    ]  # fmt: skip
    found: list[float] = []
    for k in low:
        if found and times[k] - found[-1] < 0.2:  # the same landing
            continue
        window = slice(max(k - 3, 0), min(k + 3, len(y)))
        found.append(_meeting_time(times[window], y[window], times[k], floor, 1 / fps))
    return tuple(found)


def _meeting_time(
    times: np.ndarray, y: np.ndarray, near: float, floor: float, step: float
) -> float:
    """The impact time whose flights before and after, with the world's gravity, fit best."""
    best, best_error = near, np.inf
    for impact in np.linspace(near - step, near + step, 81):
        before = np.maximum(impact - times, 0)
        after = np.maximum(times - impact, 0)
        # height = speed * tau - g/2 tau^2 on both sides; unknown: both speeds and the floor.
        free = floor - y + 0.5 * GRAVITY * (before**2 + after**2)
        rested = y[times > impact]
        stays = len(rested) > 1 and np.ptp(rested) < 0.02
        if stays:
            free = floor - y + 0.5 * GRAVITY * before**2
            after = np.zeros_like(after)
        design = np.stack([before, after, np.ones_like(times)], axis=1)
        design, target = np.vstack([design, [0, 0, 2.0]]), np.append(free, 0.0)
        speeds = np.linalg.lstsq(design, target, rcond=None)[0]
        error = float(np.square(design @ speeds - target).sum())
        if error < best_error:
            best, best_error = float(impact), error
    return best


def _pulses_seen(scale: np.ndarray, fps: float) -> tuple[float, ...]:
    """Onsets of the humps sin^2 that fit best at each peak of the object's size."""
    scale = _filled(scale)
    base = np.quantile(scale, 0.15)
    times = np.arange(len(scale)) / fps
    growth = scale / base - 1
    found: list[float] = []
    for k in range(len(growth)):
        around = growth[max(k - 2, 0) : k + 3]
        if growth[k] < 0.5 * growth.max() or growth[k] < around.max():
            continue
        middle = times[k]
        if found and middle - PULSE_S / 2 - found[-1] < 0.6 * PULSE_S:
            continue
        near = np.abs(times - middle) < 0.3
        onsets = np.linspace(-1.0, 1.0, 41) / fps + middle - PULSE_S / 2
        phase = np.clip((times[near] - onsets[:, None]) / PULSE_S, 0, 1)
        hump = np.sin(np.pi * phase) ** 2
        height = (hump * growth[near]).sum(1) / np.square(hump).sum(1)
        error = np.square(hump * height[:, None] - growth[near]).sum(1)
        found.append(float(onsets[error.argmin()]))
    return tuple(max(t, 0.0) for t in found)


def _filled(values: np.ndarray) -> np.ndarray:
    """The series with missing values taken from their neighbours."""
    good = np.isfinite(values)
    return np.interp(np.arange(len(values)), np.flatnonzero(good), values[good])


def _swings_seen(x: np.ndarray, fps: float) -> tuple[float, ...]:
    """Passes through the middle of the sinusoid that fits best."""
    x = _filled(x)
    t = np.arange(len(x)) / fps
    best, best_error = (0.0, 1.0, 0.0), np.inf
    for rate in np.linspace(2.4, 4.0, 33):
        design = np.stack([np.ones_like(t), np.cos(rate * t), np.sin(rate * t)], 1)
        fit = np.linalg.lstsq(design, x, rcond=None)[0]
        error = float(np.square(design @ fit - x).sum())
        if error < best_error:
            best, best_error = (float(np.arctan2(fit[2], fit[1])), rate, error), error
    phase, rate, _ = best  # x = middle + size * cos(rate t - phase)
    times = (np.pi / 2 + phase + np.pi * np.arange(-3, 8)) / rate
    return tuple(float(time) for time in times if 0.08 < time < (len(x) - 1.5) / fps)


def _steps_seen(spread: np.ndarray, fps: float) -> tuple[float, ...]:
    """Times when the legs are widest apart, from the stride |sin| that fits best."""
    spread = _filled(spread)
    t = np.arange(len(spread)) / fps
    phases = np.linspace(0, np.pi, 96, endpoint=False)
    strides = np.abs(np.sin(STRIDE_RATE * t + phases[:, None])) ** 1.5
    strides -= strides.mean(1, keepdims=True)
    fits = strides @ (spread - spread.mean()) / np.linalg.norm(strides, axis=1)
    phase = phases[fits.argmax()]
    times = (np.pi / 2 - phase + np.pi * np.arange(12)) / STRIDE_RATE
    return tuple(float(time) for time in times if 0 < time < len(spread) / fps)


def _clash_seen(x: np.ndarray, other: np.ndarray, fps: float) -> tuple[float, ...]:
    """When the distance of two objects stops shrinking: two straight lines that meet."""
    gap = np.abs(_filled(x) - _filled(other))
    t = np.arange(len(gap)) / fps
    best, best_error = t[len(t) // 2], np.inf
    for time in np.arange(t[2], t[-3], 0.005):
        design = np.stack([np.ones_like(t), np.maximum(time - t, 0), np.maximum(t - time, 0)], 1)
        fit = np.linalg.lstsq(design, gap, rcond=None)[0]
        error = float(np.abs(design @ fit - gap).sum())  # not squares: entries are cut off
        if error < best_error and min(fit[1:]) > 0:
            best, best_error = time, error
    return (float(best),)
