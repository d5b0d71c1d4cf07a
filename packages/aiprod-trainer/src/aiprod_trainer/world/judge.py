"""Measures a clip of the procedural world without a network: what is seen, what is heard, when.

    python -m aiprod_trainer.world.judge --validate

prints how often each measurement is right on ground-truth renders, clean and damaged.

The picture is explained as one of the known backdrops plus one object of one known colour. That
gives a soft mask for every frame, hence track, area and outline. Impacts are the cusps of the
track (two free flights that meet at the floor), pulses the humps of the area; both are timed
between frames. Onsets are sudden rises of the sound's power, and a sound's kind is the nearest
spectrum among those that the world can make.

Shapes: F frames, S image side (64 inside the judge).
"""

import argparse
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

from aiprod_core.errors import InputError
from aiprod_trainer.world.captions import sound_kind
from aiprod_trainer.world.render import backdrop, render, signed_distance
from aiprod_trainer.world.scene import (
    BACKGROUNDS,
    COLOURS,
    GRAVITY,
    PULSE_S,
    SHAPES,
    SIZES,
    Scene,
    lab,
    sample_scene,
    visible_colours,
)
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise

SIDE = 64  # pictures are measured at this size


@dataclass(frozen=True, eq=False)
class Track:
    """Where the object is in each frame, in frame widths; nan where no object was found.

    `coherence` is the mean share of the object's pixels that lie in one piece: an object in two
    places at once, or in none, lowers it.
    """

    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    coherence: float

    @property
    def largest_jump(self) -> float:
        """Longest way between two frames (a true fall covers up to 0.19 in a frame)."""
        steps = np.hypot(np.diff(self.x), np.diff(self.y))
        return float(np.nanmax(steps, initial=0.0))


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the judge measured. Times are in seconds from the start of the clip.

    `motion` is one of the world's motions or "still"; `sound` a material, "rumble", "scrape",
    "beep" or "silence". `sync_ms` is None unless both something seen and something heard can be
    compared. `pan` is 0 for sound from the left, 1 from the right.
    """

    colour: str
    shape: str
    size: str
    background: str
    motion: str
    sound: str
    seen_s: tuple[float, ...]
    heard_s: tuple[float, ...]
    sync_ms: float | None
    pan: float
    track: Track


def judge(
    frames: np.ndarray, audio: np.ndarray, sample_rate: int = SAMPLE_RATE, fps: float = 12.0
) -> Verdict:
    """Measures uint8 or float 0..255 frames (F, S, S, 3) and audio (2, samples) in [-1, 1].

    Raises InputError for other layouts.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.shape[1] != frames.shape[2]:
        raise InputError(f"frames must be (F, S, S, 3); got {frames.shape}")
    if audio.ndim != 2 or audio.shape[0] != 2:
        raise InputError(f"audio must be stereo, (2, samples); got {audio.shape}")
    picture = _to_side(frames)
    background, stage = _find_background(picture)
    colour = _find_colour(picture, stage, background)
    mask = _soft_mask(picture, stage, colour)
    track, mask = _follow(mask)
    shape = _find_shape(mask, track)
    motion = _find_motion(track)
    seen = _seen_events(track, motion, fps)
    sound = _find_sound(audio, sample_rate)
    heard = _onsets(audio, sample_rate) if sound not in ("rumble", "scrape", "silence") else ()
    last_frame_s = (len(frames) - 1) / fps
    return Verdict(
        colour=colour,
        shape=shape,
        size=_find_size(track, shape),
        background=background,
        motion=motion,
        sound=sound,
        seen_s=seen,
        heard_s=heard,
        sync_ms=sync_error_ms(seen, heard, last_frame_s - 0.05),
        pan=_pan(audio),
        track=track,
    )


def agreement(verdict: Verdict, scene: Scene) -> dict[str, bool | float]:
    """Right or wrong for each attribute of the scene; `sync_ms` and `seen_ms`, `heard_ms`
    (median distance of what is seen and heard from the true events) where there are events."""
    body = scene.body
    truth = [e.time_s for e in scene.events]
    last_frame = (scene.num_frames - 1) / scene.fps
    visible = [t for t in truth if t < last_frame - 0.05]
    audible = [t for t in truth if t < scene.duration_s - 0.05]
    result: dict[str, bool | float] = {
        "colour": verdict.colour == body.colour,
        "shape": verdict.shape == body.shape,
        "size": verdict.size == body.size,
        "background": verdict.background == scene.background,
        "motion": verdict.motion == body.motion,
        "sound": verdict.sound == sound_kind(body),
        "seen_events": len(visible) <= len(verdict.seen_s) <= len(truth),
        "heard_events": len(audible) <= len(verdict.heard_s) <= len(truth),
    }
    for name, times, expected in (
        ("seen_ms", verdict.seen_s, visible),
        ("heard_ms", verdict.heard_s, audible),
    ):
        error = sync_error_ms(tuple(expected), times, last_frame - 0.05)
        if error is not None:
            result[name] = error
    if verdict.sync_ms is not None:
        result["sync_ms"] = verdict.sync_ms
    return result


def sync_error_ms(
    seen_s: tuple[float, ...], heard_s: tuple[float, ...], until_s: float = np.inf
) -> float | None:
    """Median distance between each event of one kind and the nearest of the other, both ways, so
    that neither missing nor superfluous sounds go free. Sounds after `until_s`, when nothing is
    seen any more, need no partner. None if either side is empty."""
    if not seen_s or not heard_s:
        return None
    distance = np.abs(np.subtract.outer(seen_s, heard_s))
    due = np.asarray(heard_s) <= until_s
    return float(np.median(np.concatenate([distance.min(1), distance.min(0)[due]])) * 1000)


# Picture.


def _to_side(frames: np.ndarray) -> np.ndarray:
    """Float32 pictures of the judge's size, by averaging blocks of pixels."""
    picture = frames.astype(np.float32)
    factor, rest = divmod(frames.shape[1], SIDE)
    if factor == 0 or rest:
        raise InputError(f"frames must be a multiple of {SIDE} pixels wide; got {frames.shape[1]}")
    count = len(frames)
    return picture.reshape(count, SIDE, factor, SIDE, factor, 3).mean(axis=(2, 4))


def _find_background(picture: np.ndarray) -> tuple[str, np.ndarray]:
    """The nearest known backdrop, and it corrected by the pixels that no object touches."""
    best = min(
        BACKGROUNDS,
        key=lambda name: float(np.abs(picture[::4] - _stage(name)).mean(-1).clip(0, 60).mean()),
    )
    return best, _stage(best)


@lru_cache
def _stage(background: str) -> np.ndarray:
    return backdrop(background, SIDE)[0]


def _find_colour(picture: np.ndarray, stage: np.ndarray, background: str) -> str:
    """Most frequent palette colour among the pixels that the backdrop does not explain."""
    pixels = picture[_from_stage(picture, stage) > 45]
    if len(pixels) < 20:  # nothing there: whatever differs most
        pixels = picture.reshape(-1, 3)[np.argsort(_from_stage(picture, stage).ravel())[-200:]]
    names = visible_colours(background)
    palette = np.array([COLOURS[name] for name in names])
    distance = np.linalg.norm(lab(pixels[::3])[:, None] - lab(palette), axis=-1)
    return names[int(np.bincount(distance.argmin(1), minlength=len(names)).argmax())]


def _from_stage(picture: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Distance of each pixel from the backdrop in any shade down to the darkest shadow."""
    return np.min(
        [np.linalg.norm(picture - stage * shade, axis=-1) for shade in (1.0, 0.88, 0.76, 0.64)], 0
    )


def _soft_mask(picture: np.ndarray, stage: np.ndarray, colour: str) -> np.ndarray:
    """How much more each pixel looks like the object than like the backdrop, (F, S, S)."""
    paint = np.array(COLOURS[colour], dtype=np.float32)
    to_object = np.full(picture.shape[:3], np.inf, dtype=np.float32)
    for shade in (0.7, 0.85, 1.0):
        for gloss in (0.0, 0.3, 0.6):
            tone = paint * shade + (255 - paint * shade) * gloss
            np.minimum(to_object, np.linalg.norm(picture - tone, axis=-1), out=to_object)
    to_stage = _from_stage(picture, stage)
    return to_stage / (to_stage + to_object + 1e-3)


def _follow(mask: np.ndarray) -> tuple[Track, np.ndarray]:
    """Track of the largest piece in each frame, and the mask without the other pieces."""
    count = len(mask)
    x, y, area = (np.full(count, np.nan) for _ in range(3))
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
    return Track(x, y, area, float(share.mean())), kept


def _find_shape(mask: np.ndarray, track: Track) -> str:
    """The outline that overlaps best with the mask, both with the same centroid and area."""
    frames = np.flatnonzero(np.isfinite(track.x))[::3]
    if not len(frames):
        return SHAPES[0]
    scores = dict.fromkeys(SHAPES, 0.0)
    for frame in frames:
        for shape in SHAPES:
            unit_area, shift = _outline(shape)
            radius = np.sqrt(track.area[frame] / unit_area) * SIDE
            columns = (np.arange(SIDE) + 0.5 - track.x[frame] * SIDE) / radius
            rows = -(np.arange(SIDE) + 0.5 - track.y[frame] * SIDE) / radius + shift
            distance = signed_distance(shape, *np.meshgrid(columns, rows))
            cover = np.clip(0.5 - distance * radius, 0, 1)
            overlap = np.minimum(cover, mask[frame]).sum() / np.maximum(cover, mask[frame]).sum()
            scores[shape] += overlap
    return max(scores, key=scores.__getitem__)


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
    radius = np.sqrt(np.quantile(found, 0.25) / _outline(shape)[0])
    return min(SIZES, key=lambda name: abs(SIZES[name] - radius))


def _find_motion(track: Track) -> str:
    found = np.isfinite(track.x)
    if found.sum() < 5:
        return "still"
    x, y, scale = track.x[found], track.y[found], np.sqrt(track.area[found])
    quarter = max(len(x) // 5, 1)
    way = np.median(x[-quarter:]) - np.median(x[:quarter])
    if abs(way) > 0.2:
        return "roll right" if way > 0 else "roll left"
    if np.ptp(y) > 0.14:
        lowest = y.max()
        landed = int(np.argmax(y > lowest - 0.05))
        rises = lowest - y[landed:].min() > 0.25 * np.ptp(y)
        return "bounce" if rises else "fall"
    swollen = np.quantile(scale, 0.95) / np.quantile(scale, 0.1)
    return "pulse" if swollen > 1.15 else "still"


def _seen_events(track: Track, motion: str, fps: float) -> tuple[float, ...]:
    if motion in ("bounce", "fall"):
        return _impacts_seen(track.y, fps)
    if motion == "pulse":
        return _pulses_seen(np.sqrt(track.area), fps)
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


# Sound.

BANDS_HZ = 60 * 2 ** (np.arange(43) / 6)  # edges, six to the octave, up to 7.7 kHz
SILENCE = 2e-3  # root mean square


def _find_sound(audio: np.ndarray, sample_rate: int) -> str:
    if np.sqrt(np.mean(np.square(audio))) < SILENCE:
        return "silence"
    spectrum = _spectrum(audio, sample_rate)
    kinds, templates = _known_sounds(sample_rate)
    return kinds[int(np.argmax(templates @ spectrum))]


def _spectrum(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Amplitude in bands of a sixth of an octave, scaled to length 1; loudness drops out."""
    length = fft.next_fast_len(audio.shape[-1], real=True)
    power = np.square(np.abs(np.asarray(fft.rfft(audio, length, axis=-1)))).sum(0)
    band = np.searchsorted(BANDS_HZ, fft.rfftfreq(length, 1 / sample_rate))
    bands = np.sqrt(np.bincount(band, power, minlength=len(BANDS_HZ) + 1))[1:-1]
    bands = ndimage.gaussian_filter1d(bands, 0.7)
    return bands / (np.linalg.norm(bands) + 1e-12)


@lru_cache
def _known_sounds(sample_rate: int) -> tuple[list[str], np.ndarray]:
    """Spectra of every sound that the world can make, rendered once from scenes of each kind."""
    kinds, spectra = [], []
    rng = np.random.default_rng(0)
    wanted = [("fall", {"material": m}) for m in ("rubber", "wood", "metal", "glass")]
    wanted += [("roll left", {"shape": "ball"}), ("roll left", {"shape": "cube"}), ("pulse", {})]
    for motion, fixed in wanted:
        for size in SIZES:
            scene = sample_scene(rng, motion=motion, size=size, **fixed)
            kinds.append(sound_kind(scene.body))
            spectra.append(_spectrum(synthesise(scene, sample_rate), sample_rate))
    return kinds, np.stack(spectra)


def _onsets(audio: np.ndarray, sample_rate: int) -> tuple[float, ...]:
    """Times where the power of the next 12 ms stands well above that of the last 24 ms."""
    power = np.square(audio.astype(np.float64)).sum(0)
    after_n, before_n = round(0.012 * sample_rate), round(0.024 * sample_rate)
    total = np.concatenate([np.zeros(before_n), power, np.zeros(after_n)]).cumsum()
    total = np.insert(total, 0, 0.0)
    at = np.arange(len(power)) + before_n
    after = (total[at + after_n] - total[at]) / after_n
    before = (total[at] - total[at - before_n]) / before_n
    floor = 2e-3 * after.max() + 1e-9
    rise = 10 * np.log10((after + floor) / (before + floor))
    rise[after < 0.02 * after.max()] = 0
    found = []
    gap = round(0.12 * sample_rate)
    while rise.max() > 4.0:
        best = int(rise.argmax())
        found.append(best / sample_rate)
        rise[max(best - gap, 0) : best + gap] = 0
    return tuple(sorted(found))


def _pan(audio: np.ndarray) -> float:
    left, right = np.sqrt(np.mean(np.square(audio), axis=1) + 1e-12)
    return float(np.arctan2(right, left) / (np.pi / 2))


# Validation.


def damage(frames: np.ndarray, audio: np.ndarray, rng: np.random.Generator):
    """Blur and noise like a codec's: Gaussian blur of 0.7 pixels, noise of 30 dB PSNR; in the
    sound, noise 30 dB below it."""
    blurred = ndimage.gaussian_filter(frames.astype(np.float32), (0, 0.7, 0.7, 0))
    noise = rng.standard_normal(frames.shape, dtype=np.float32) * 255 * 10 ** (-30 / 20)
    loud = np.sqrt(np.mean(np.square(audio)))
    hiss = rng.standard_normal(audio.shape, dtype=np.float32) * loud * 10 ** (-30 / 20)
    return np.clip(blurred + noise, 0, 255).astype(np.uint8), audio + hiss


def validate(count: int = 240, seed: int = 0, size: int = SIDE) -> dict[str, dict[str, float]]:
    """Share of right verdicts (and medians of the times, in ms) over `count` random renders."""
    table: dict[str, dict[str, float]] = {}
    for name in ("clean", "damaged"):
        rng = np.random.default_rng(seed)
        rows: dict[str, list[float]] = {}
        heard_before: tuple[float, ...] = ()
        for _ in range(count):
            scene = sample_scene(rng)
            frames, audio = render(scene, size), synthesise(scene)
            if name == "damaged":
                frames, audio = damage(frames, audio, rng)
            verdict = judge(frames, audio)
            for key, value in agreement(verdict, scene).items():
                rows.setdefault(key, []).append(float(value))
            # What sync_ms would be if sound and picture did not know each other.
            shuffled = sync_error_ms(verdict.seen_s, heard_before)
            if shuffled is not None:
                rows.setdefault("shuffled_ms", []).append(shuffled)
            heard_before = verdict.heard_s or heard_before
        table[name] = {
            key: float(np.median(values) if key.endswith("_ms") else np.mean(values))
            for key, values in rows.items()
        }
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures a clip of the procedural world.")
    parser.add_argument("--validate", action="store_true", help="judge ground-truth renders")
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=SIDE, help="pixels")
    arguments = parser.parse_args(argv)
    if not arguments.validate:
        parser.error("nothing to do: add --validate")
    table = validate(arguments.count, arguments.seed, arguments.size)
    print(f"{'measure':16}{'clean':>10}{'damaged':>10}")
    for key in sorted(set(table["clean"]) | set(table["damaged"])):
        cells = []
        for name in ("clean", "damaged"):
            value = table[name].get(key, float("nan"))
            cells.append(f"{value:7.1f} ms" if key.endswith("_ms") else f"{100 * value:8.1f} %")
        print(f"{key:16}{cells[0]:>10}{cells[1]:>10}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
