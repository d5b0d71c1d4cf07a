"""The sound of a scene: 16 kHz stereo, every sound placed at its event and panned to its object.

Materials are told apart by their spectrum (struck modes and how long they ring), sizes by pitch,
speeds by loudness.
"""

from functools import lru_cache

import numpy as np
from scipy import fft

from aiprod_trainer.world.scene import PULSE_S, ROUND, SIZES, Body, Event, Scene, trajectory

SAMPLE_RATE = 16_000

# Modes of a struck medium-sized object: (frequency in Hz, level, decay time in s).
MODES = {
    "rubber": ((120.0, 1.0, 0.10), (205.0, 0.25, 0.05)),
    "wood": ((400.0, 1.0, 0.075), (640.0, 0.45, 0.050), (1010.0, 0.18, 0.02)),
    "metal": ((1210.0, 1.0, 0.32), (1790.0, 0.6, 0.26), (2060.0, 0.25, 0.22), (3300.0, 0.2, 0.12)),
    "glass": ((2650.0, 1.0, 0.11), (4080.0, 0.55, 0.08), (5700.0, 0.3, 0.05)),
}
LEVEL = {"rubber": 0.95, "wood": 0.9, "metal": 0.6, "glass": 0.65}  # about equally loud
BEEP_HZ = {"small": 988.0, "medium": 784.0, "large": 622.0, "huge": 494.0}
BEEP_LEVEL = 0.25
ROLL_BAND_HZ, SLIDE_BAND_HZ = (180.0, 520.0), (1500.0, 3600.0)
ROLL_LEVEL, SLIDE_LEVEL = 0.16, 0.10  # root mean square at 0.3 frame widths per second

STEP_BAND_HZ, STEP_LEVEL = (500.0, 1300.0), 0.40
WHOOSH_BAND_HZ, WHOOSH_LEVEL, WHOOSH_S = (700.0, 1500.0), 0.20, 0.5
WHIRR_LEVEL = 0.09
AMBIENCE_LEVEL = 0.012


def synthesise(scene: Scene, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Sounds the clip as float32 (2, round(duration * sample_rate)) in [-1, 1]."""
    samples = round(scene.num_frames / scene.fps * sample_rate)
    out = np.zeros((2, samples))
    for event in scene.events:
        sound, lead_s = _event_sound(scene, event, sample_rate)
        start = round((event.time_s - lead_s) * sample_rate)
        sound = sound[max(-start, 0) : samples - start]
        start = max(start, 0)
        out[:, start : start + len(sound)] += pan(np.array(event.x))[:, None] * sound
    times = np.arange(samples) / sample_rate
    for index, body in enumerate(scene.bodies):
        if body.motion in ("roll left", "roll right"):
            noise = _friction(body, times, scene.noise_seed + index, sample_rate)
            out += pan(trajectory(body, times).x) * noise
        if body.motion == "spin":
            out += pan(np.array(body.x))[:, None] * _whirr(body, times)
    if scene.ambience != "silence":
        out += _ambience(scene.ambience, times, scene.noise_seed, sample_rate)
    return np.clip(out, -1, 1).astype(np.float32)


def pan(x: np.ndarray) -> np.ndarray:
    """Constant-power gains (left, right) stacked first, for a place 0 (left) to 1 (right)."""
    angle = np.clip(x, 0, 1) * (np.pi / 2)
    return np.stack([np.cos(angle), np.sin(angle)])


def size_pitch(size: str) -> float:
    """How much higher than a medium-sized object one of this size sounds."""
    return (SIZES["medium"] / SIZES[size]) ** 0.4


def _event_sound(scene: Scene, event: Event, sample_rate: int) -> tuple[np.ndarray, float]:
    """The sound of an event, and how long before the event it begins."""
    body = scene.bodies[event.body]
    if event.kind == "impact":
        return _impact(body, event, sample_rate), 0.0
    if event.kind == "pulse":
        return _beep_of(body.size, sample_rate), 0.0
    if event.kind == "step":
        return _footstep(sample_rate), 0.0
    if event.kind == "swing":
        return _whoosh(sample_rate), WHOOSH_S / 2
    # Two colliding bodies share their material, and so ring for the same length.
    struck = [0.7 * _impact(hit, event, sample_rate) for hit in scene.bodies]
    return np.sum(struck, axis=0), 0.0


def _impact(body: Body, event: Event, sample_rate: int) -> np.ndarray:
    level = LEVEL[body.material] * (0.35 + 0.65 * event.strength)
    return level * _struck(body.material, body.size, sample_rate)


@lru_cache(maxsize=64)
def _struck(material: str, size: str, sample_rate: int) -> np.ndarray:
    """A hit with peak 1: decaying sines behind a 1 ms attack."""
    modes = MODES[material]
    t = np.arange(int(5 * max(decay for _, _, decay in modes) * sample_rate)) / sample_rate
    pitch = size_pitch(size)
    hit = sum(
        level * np.sin(2 * np.pi * hz * pitch * t) * np.exp(-t / decay)
        for hz, level, decay in modes
    )
    hit *= np.clip(t / 0.001, 0, 1)
    return hit / np.abs(hit).max()


@lru_cache(maxsize=16)
def _beep_of(size: str, sample_rate: int) -> np.ndarray:
    length = 0.8 * PULSE_S
    t = np.arange(round(length * sample_rate)) / sample_rate
    envelope = np.clip(np.minimum(t / 0.006, (length - t) / 0.05), 0, 1)
    hz = BEEP_HZ[size]
    return BEEP_LEVEL * envelope * (np.sin(2 * np.pi * hz * t) + 0.25 * np.sin(4 * np.pi * hz * t))


@lru_cache(maxsize=4)
def _footstep(sample_rate: int) -> np.ndarray:
    """A short dry tap: one noise burst, the same for every step."""
    t = np.arange(round(0.12 * sample_rate)) / sample_rate
    noise = _band_noise(len(t), STEP_BAND_HZ, 7, sample_rate)
    return STEP_LEVEL * noise * np.exp(-t / 0.022) * np.clip(t / 0.001, 0, 1)


@lru_cache(maxsize=4)
def _whoosh(sample_rate: int) -> np.ndarray:
    """Air past a swinging object: noise that swells towards its middle and dies away."""
    t = np.arange(round(WHOOSH_S * sample_rate)) / sample_rate
    noise = _band_noise(len(t), WHOOSH_BAND_HZ, 8, sample_rate)
    return WHOOSH_LEVEL * noise * np.sin(np.pi * t / WHOOSH_S) ** 3


def _whirr(body: Body, times: np.ndarray) -> np.ndarray:
    """A buzz of many harmonics that beats with the turning."""
    hz = 165.0 * size_pitch(body.size)
    buzz = np.sum([np.sin(2 * np.pi * hz * n * times) / n for n in range(1, 9)], axis=0)
    beat = 0.75 + 0.25 * np.cos(2 * body.turn_rate * times)
    return WHIRR_LEVEL * buzz * beat * np.clip(times / 0.03, 0, 1)


def _ambience(kind: str, times: np.ndarray, seed: int, sample_rate: int) -> np.ndarray:
    """A quiet bed of rain, wind or hum, the same on both sides but for its grain, (2, samples)."""
    if kind == "hum":
        tones = np.sin(2 * np.pi * 55 * times) + 0.6 * np.sin(2 * np.pi * 110 * times)
        return np.repeat(AMBIENCE_LEVEL * tones[None], 2, axis=0)
    band = {"rain": (3800.0, 7600.0), "wind": (160.0, 330.0)}[kind]
    sides = [_band_noise(len(times), band, [seed, side], sample_rate) for side in (1, 2)]
    gust = 1.0 if kind == "rain" else 1 + 0.4 * np.sin(2 * np.pi * 0.6 * times)
    return AMBIENCE_LEVEL * gust * np.stack(sides)


def _band_noise(
    samples: int, band_hz: tuple[float, float], seed: int | list[int], sample_rate: int
) -> np.ndarray:
    """Noise of root mean square 1 whose spectrum falls off smoothly outside the band."""
    low, high = band_hz
    length = fft.next_fast_len(samples, real=True)
    noise = np.random.default_rng(seed).standard_normal(length)
    hz = fft.rfftfreq(length, 1 / sample_rate)
    octaves = np.log2(np.maximum(hz, 1) / np.sqrt(low * high))
    band = np.exp(-np.square(octaves / np.log2(high / low)))
    noise = np.asarray(fft.irfft(fft.rfft(noise) * band, length))[:samples]
    return noise / noise.std()


def _friction(body: Body, times: np.ndarray, seed: int, sample_rate: int) -> np.ndarray:
    """Band noise, louder with speed; round things rumble once a turn, the others scrape evenly."""
    rolls = body.shape in ROUND
    band, level = (ROLL_BAND_HZ, ROLL_LEVEL) if rolls else (SLIDE_BAND_HZ, SLIDE_LEVEL)
    noise = _band_noise(len(times), band, seed, sample_rate)
    noise *= level * np.sqrt(abs(body.speed) / 0.3)
    if rolls:
        noise *= 1 + 0.3 * np.cos(body.speed * times / body.radius)
    return noise * np.clip(times / 0.03, 0, 1)
