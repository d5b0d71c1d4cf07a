"""Faults of a sound that can be heard without knowing what it should be.

Samples are float (channels, samples), full scale 1; levels in dB are relative to it (dBFS).
"""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, signal

from aiprod_pipelines.media import Audio
from aiprod_pipelines.metrics.picture import Span, runs

LOUDNESS_BLOCK_S = 0.4  # BS.1770 gates blocks of this length, so nothing shorter has a loudness
SILENT_DB = -60.0


@dataclass(frozen=True)
class Tone:
    """A tone that never stops: its frequency, and by how many dB it stands out of its surroundings
    (about 80 Hz to both sides) in nine tenths of the clip or more."""

    hz: float
    prominence_db: float


def loudness_lufs(audio: Audio) -> float | None:
    """Integrated loudness after ITU-R BS.1770-4 in LUFS; None for silence and below 0.4 s."""
    import pyloudnorm

    samples = audio.samples.T.astype(np.float64)
    if samples.shape[0] < LOUDNESS_BLOCK_S * audio.sample_rate:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the logarithm of silence
        meter = pyloudnorm.Meter(audio.sample_rate, block_size=LOUDNESS_BLOCK_S)
        loudness = float(meter.integrated_loudness(samples))
    return loudness if np.isfinite(loudness) else None


def peak_dbfs(audio: Audio) -> float:
    """Largest sample in dBFS; -inf for digital silence."""
    peak = float(np.abs(audio.samples).max(initial=0.0))
    return 20 * np.log10(peak) if peak else -np.inf


def clipped_spans(audio: Audio, *, shortest: int = 4) -> tuple[Span, ...]:
    """Spans in which the wave is cut off: `shortest` or more samples of a channel at full scale,
    or at one and the same level in the upper half of the scale."""
    cut = np.zeros(audio.samples.shape[1], dtype=bool)
    for channel in audio.samples:
        level = np.abs(channel)
        same = np.abs(np.diff(channel, append=np.nan)) < 1e-5
        held = same | np.concatenate([[False], same[:-1]])
        for start, stop in runs((level >= 0.999) | (held & (level > 0.5))):
            if stop - start >= shortest:
                cut[start:stop] = True
    rate = audio.sample_rate
    return tuple(Span(start / rate, stop / rate) for start, stop in runs(cut))


def silent_spans(
    audio: Audio, *, below_db: float = SILENT_DB, min_s: float = 0.25
) -> tuple[Span, ...]:
    """Spans of at least `min_s` in which every 10 ms stay below `below_db` (root mean square)."""
    levels, step_s = levels_db(audio, 0.01)
    spans = [Span(a * step_s, b * step_s) for a, b in runs(levels < below_db)]
    return tuple(span for span in spans if span.duration_s >= min_s - 1e-9)


def is_finite(audio: Audio) -> bool:
    return bool(np.isfinite(audio.samples).all())


def lasting_tone(audio: Audio) -> Tone | None:
    """The most prominent tone that sounds all through: a whistle, a hum, a ringing vocoder.

    None where nothing stands out, and for sounds too short to tell (under 0.2 s).
    """
    rate = audio.sample_rate
    size = 2 ** round(np.log2(0.128 * rate))  # 8 Hz apart at 16 kHz
    if audio.samples.shape[1] < 1.5 * size or not np.any(audio.samples):
        return None
    mono = audio.samples.mean(axis=0)
    hz, _, parts = signal.spectrogram(
        mono, rate, window="hann", nperseg=size, noverlap=size // 2, mode="magnitude"
    )
    level = 20 * np.log10(parts + 1e-7)  # (bins, times)
    prominence = level - ndimage.median_filter(level, size=(21, 1))  # a tone covers 4 bins
    lasting = np.quantile(prominence, 0.1, axis=1)
    lasting[(hz < 40) | (hz > 0.45 * rate)] = -np.inf
    best = int(lasting.argmax())
    if lasting[best] < 6:  # no more than chance gives
        return None
    return Tone(float(hz[best]), float(lasting[best]))


def onset_strength(audio: Audio, step_s: float = 0.005) -> np.ndarray:
    """How suddenly sound sets in at each multiple of `step_s`: spectral flux, >= 0.

    The half-wave rectified rise of logarithmic band levels from the 10 ms before to the 10 ms
    after, added over bands (Bello et al. 2005, "A tutorial on onset detection in music signals").
    """
    rate = audio.sample_rate
    size, step = round(0.010 * rate), step_s * rate
    count = int(audio.samples.shape[1] / step)
    padded = np.pad(audio.samples.mean(axis=0), (2 * size, 2 * size))
    at = np.round(np.arange(count) * step).astype(int) + 2 * size

    def bands(starts: np.ndarray) -> np.ndarray:
        pieces = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
        return np.abs(np.fft.rfft(pieces, 256 if size <= 256 else size, axis=1)) ** 0.5

    rise = np.maximum(bands(at) - bands(at - size), 0).sum(axis=1)
    return ndimage.gaussian_filter1d(rise, 0.8)


def levels_db(audio: Audio, window_s: float) -> tuple[np.ndarray, float]:
    """Level of the loudest channel in each whole window, and the windows' length in seconds."""
    size = max(round(window_s * audio.sample_rate), 1)
    count = audio.samples.shape[1] // size
    pieces = audio.samples[:, : count * size].reshape(len(audio.samples), count, size)
    power = np.square(pieces.astype(np.float64)).mean(axis=2).max(axis=0)
    return 10 * np.log10(power + 1e-20), size / audio.sample_rate
