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


def synthesise(scene: Scene, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Sounds the clip as float32 (2, round(duration * sample_rate)) in [-1, 1]."""
    samples = round(scene.num_frames / scene.fps * sample_rate)
    out = np.zeros((2, samples))
    for event in scene.events:
        body = scene.bodies[event.body]
        sound = (
            _impact(body, event, sample_rate)
            if event.kind == "impact"
            else _beep(body, sample_rate)
        )
        start = round(event.time_s * sample_rate)
        sound = sound[: samples - start]
        out[:, start : start + len(sound)] += pan(np.array(event.x))[:, None] * sound
    times = np.arange(samples) / sample_rate
    for index, body in enumerate(scene.bodies):
        if body.motion in ("roll left", "roll right"):
            noise = _friction(body, times, scene.noise_seed + index, sample_rate)
            out += pan(trajectory(body, times).x) * noise
    return np.clip(out, -1, 1).astype(np.float32)


def pan(x: np.ndarray) -> np.ndarray:
    """Constant-power gains (left, right) stacked first, for a place 0 (left) to 1 (right)."""
    angle = np.clip(x, 0, 1) * (np.pi / 2)
    return np.stack([np.cos(angle), np.sin(angle)])


def size_pitch(size: str) -> float:
    """How much higher than a medium-sized object one of this size sounds."""
    return (SIZES["medium"] / SIZES[size]) ** 0.4


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


def _beep(body: Body, sample_rate: int) -> np.ndarray:
    return _beep_of(body.size, sample_rate)


def _friction(body: Body, times: np.ndarray, seed: int, sample_rate: int) -> np.ndarray:
    """Band noise, louder with speed; round things rumble once a turn, the others scrape evenly."""
    rolls = body.shape in ROUND
    low, high = ROLL_BAND_HZ if rolls else SLIDE_BAND_HZ
    level = ROLL_LEVEL if rolls else SLIDE_LEVEL
    length = fft.next_fast_len(len(times), real=True)
    noise = np.random.default_rng(seed).standard_normal(length)
    hz = fft.rfftfreq(length, 1 / sample_rate)
    band = np.exp(
        -np.square(np.log2(np.maximum(hz, 1) / np.sqrt(low * high)) / np.log2(high / low))
    )
    noise = np.asarray(fft.irfft(fft.rfft(noise) * band, length))[: len(times)]
    noise *= level * np.sqrt(abs(body.speed) / 0.3) / noise.std()
    if rolls:
        noise *= 1 + 0.3 * np.cos(body.speed * times / body.radius)
    return noise * np.clip(times / 0.03, 0, 1)
