"""What can be heard in a clip, measured without a network: kind of sound, onsets, ambience."""

from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

from aiprod_trainer.world.captions import sound_kind
from aiprod_trainer.world.scene import MATERIALS, SIZES, sample_scene
from aiprod_trainer.world.sound import synthesise

BANDS_HZ = 50 * 2 ** (np.arange(44) / 6)  # edges, six to the octave, up to 7.2 kHz
SILENCE, STILLNESS = 0.016, 0.004  # root mean square below which nothing sounds, or no ambience
STRUCK = ("rubber", "wood", "metal", "glass", "beep", "steps")  # kinds with a sharp onset


def find_sound(audio: np.ndarray, sample_rate: int) -> str:
    """The nearest of the sounds that the world can make, or "silence"."""
    if np.sqrt(np.mean(np.square(audio))) < SILENCE:
        return "silence"
    kinds, templates = _known_sounds(sample_rate)
    distance = np.square(templates - _fingerprint(audio, sample_rate)).sum(-1)
    return kinds[int(distance.argmin())]


def heard_events(audio: np.ndarray, kind: str, sample_rate: int) -> tuple[float, ...]:
    """Times of the onsets of struck sounds, of the peaks of a whoosh; none for lasting sounds."""
    if kind in STRUCK:
        return _onsets(audio, sample_rate)
    return _swells(audio, sample_rate) if kind == "whoosh" else ()


def find_ambience(audio: np.ndarray, kind: str, sample_rate: int) -> str | None:
    """What sounds while nothing else does; None under a sound that never pauses."""
    if kind in ("rumble", "scrape", "whirr"):
        return None
    window = round(0.04 * sample_rate)
    count = audio.shape[1] // window
    pieces = audio[:, : count * window].reshape(2, count, window)
    loud = np.sqrt(np.square(pieces).mean((0, 2)))
    quiet = pieces[:, np.argsort(loud)[: max(count // 8, 1)]]
    if np.sqrt(np.square(quiet).mean()) < STILLNESS:
        return "silence"
    power = np.square(np.abs(np.fft.rfft(quiet * np.hanning(window)))).sum((0, 1))
    hz = np.fft.rfftfreq(window, 1 / sample_rate)
    centre = np.exp((power[1:] * np.log(hz[1:])).sum() / power[1:].sum())
    return "hum" if centre < 140 else "wind" if centre < 1000 else "rain"


def find_pan(audio: np.ndarray) -> float:
    """Where the sound comes from, 0 left to 1 right."""
    left, right = np.sqrt(np.mean(np.square(audio), axis=1) + 1e-12)
    return float(np.arctan2(right, left) / (np.pi / 2))


def _fingerprint(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Amplitudes in bands of a sixth of an octave, scaled to length 1 so that loudness drops out,
    and the share of the clip in which it sounds, which tells a tap from a rumble."""
    length = fft.next_fast_len(audio.shape[-1], real=True)
    power = np.square(np.abs(np.asarray(fft.rfft(audio, length, axis=-1)))).sum(0)
    band = np.searchsorted(BANDS_HZ, fft.rfftfreq(length, 1 / sample_rate))
    bands = np.sqrt(np.bincount(band, power, minlength=len(BANDS_HZ) + 1))[1:-1]
    bands = ndimage.gaussian_filter1d(bands, 0.7)
    bands /= np.linalg.norm(bands) + 1e-12
    window = round(0.02 * sample_rate)
    count = audio.shape[1] // window
    loud = np.square(audio[:, : count * window]).reshape(2, count, window).sum((0, 2))
    return np.append(bands, 0.6 * np.mean(loud > 0.05 * np.quantile(loud, 0.98)))


@lru_cache
def _known_sounds(sample_rate: int) -> tuple[list[str], np.ndarray]:
    """Spectra of every sound that the world can make, rendered once from scenes of each kind."""
    kinds, spectra = [], []
    rng = np.random.default_rng(0)
    wanted: list[tuple[str, dict[str, str]]]
    wanted = [(motion, {"material": m}) for motion in ("fall", "bounce") for m in MATERIALS]
    wanted += [("roll left", {"shape": "ball"}), ("roll left", {"shape": "cube"})]
    wanted += [(motion, {}) for motion in ("pulse", "pulse", "pendulum", "spin", "walk left")]
    for motion, fixed in wanted:
        for size in SIZES:
            fixed = fixed | {"camera": "static", "ambience": "silence"}
            scene = sample_scene(rng, world="v2", motion=motion, size=size, **fixed)
            kinds.append(sound_kind(scene.body))
            spectra.append(_fingerprint(synthesise(scene, sample_rate), sample_rate))
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
    floor = 0.01 * after.max() + 1e-9
    rise = 10 * np.log10((after + floor) / (before + floor))
    rise[after < 0.08 * after.max()] = 0  # beds and beats are quieter than any event
    found = []
    gap = round(0.12 * sample_rate)
    while rise.max() > 5.0:
        best = int(rise.argmax())
        found.append(best / sample_rate)
        rise[max(best - gap, 0) : best + gap] = 0
    return tuple(sorted(found))


def _swells(audio: np.ndarray, sample_rate: int) -> tuple[float, ...]:
    """Peaks of the smoothed loudness, at least 0.5 s apart."""
    step = round(0.005 * sample_rate)
    count = audio.shape[1] // step
    loud = np.sqrt(np.square(audio[:, : count * step]).reshape(2, count, step).mean((0, 2)))
    loud = ndimage.gaussian_filter1d(loud, 12)
    found: list[float] = []
    left = loud.copy()
    while left.max() > 0.5 * loud.max():
        peak = int(left.argmax())
        if 0 < peak < count - 1 and loud[peak] >= max(loud[peak - 1], loud[peak + 1]):
            found.append((peak + 0.5) * step / sample_rate)
        left[max(peak - 100, 0) : peak + 100] = 0
    return tuple(sorted(found))
