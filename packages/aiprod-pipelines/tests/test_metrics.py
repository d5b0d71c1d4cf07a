"""Planted faults are found where and as large as they were planted."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_pipelines.media import Audio
from aiprod_pipelines.metrics import motion, picture, report, sound, sync
from aiprod_pipelines.metrics.picture import Span

RATE, FPS = 16000, 12.0
few = settings(max_examples=15, deadline=None)


def texture(size: int, seed: int = 0) -> np.ndarray:
    """Soft random blobs, float (size, size, 3) in 40..215."""
    noise = np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.repeat((127 + 40 * soft / soft.std()).clip(40, 215)[..., None], 3, -1)


def drifting(num_frames: int = 24, right: float = 0.0, zoom: float = 0.0) -> np.ndarray:
    """A camera over a texture: `right` frame widths a second, `zoom` as log per second, 96 px."""
    wide = texture(256)
    frames = []
    for t in (np.arange(num_frames) - num_frames / 2) / FPS:
        scale = np.exp(zoom * t)
        at = 128 + right * t * 96
        matrix = np.float32([[scale, 0, 48 - scale * at], [0, scale, 48 - scale * 128]])
        frames.append(cv2.warpAffine(wide, matrix, (96, 96)))
    return np.stack(frames).astype(np.uint8)


def clicks(times_s, duration_s: float = 3.0, level: float = 0.5) -> Audio:
    t = np.arange(round(duration_s * RATE)) / RATE
    wave = np.zeros_like(t)
    for time in times_s:
        after = np.maximum(t - time, 0)
        wave += (t >= time) * level * np.exp(-after / 0.03) * np.sin(2 * np.pi * 700 * after)
    return Audio(np.stack([wave, wave]).astype(np.float32), RATE)


# Picture.


@few
@given(start=st.integers(0, 15), length=st.integers(4, 9))
def test_a_frozen_span_is_found_exactly(start, length):
    frames = drifting(24, right=0.3)
    frames[start : start + length] = frames[start]
    assert picture.frozen_spans(frames, FPS) == (Span(start / FPS, (start + length) / FPS),)


@few
@given(amplitude=st.floats(1.0, 20.0))
def test_flicker_is_the_amplitude_of_alternating_brightness(amplitude):
    steady = drifting(20, right=0.1).astype(np.float32)
    sign = np.where(np.arange(20) % 2, 1, -1)[:, None, None, None]
    assert picture.flicker(steady + amplitude * sign) == pytest.approx(amplitude, abs=1.0)
    assert picture.flicker(steady) < 0.5


def test_black_empty_and_nan_frames_are_told_apart_and_placed():
    frames = drifting(24, right=0.3).astype(np.float32)
    frames[3:6], frames[9:12], frames[20] = 2.0, 128.0, np.nan
    found = report.measure(frames, FPS, None).spans
    assert found["black"] == (Span(3 / FPS, 6 / FPS), Span(20 / FPS, 21 / FPS))
    assert Span(9 / FPS, 12 / FPS) in found["empty"]
    assert found["nonfinite"] == (Span(20 / FPS, 21 / FPS),)


@few
@given(at=st.integers(8, 88), levels=st.floats(15, 40), axis=st.sampled_from(["column", "row"]))
def test_a_seam_is_found_at_its_line_with_its_height(at, levels, axis):
    frames = drifting(12, right=0.3).astype(np.float32)
    assert picture.seam(frames).levels < 10
    if axis == "column":
        frames[:, :, at:] += levels
    else:
        frames[:, at:] += levels
    found = picture.seam(frames)
    assert (found.axis, found.position) == (axis, at)
    assert found.levels == pytest.approx(levels, abs=5)


def test_a_cut_is_found_at_its_frame_and_motion_is_no_cut():
    frames = drifting(24, right=0.1)
    assert picture.cuts(frames, FPS) == ()
    frames[14:] = 255 - frames[14:]
    assert picture.cuts(frames, FPS) == (14 / FPS,)


# Motion.


@few
@given(right=st.floats(-0.6, 0.6), zoom=st.floats(-0.3, 0.3))
def test_the_camera_is_measured_in_widths_and_log_zoom_a_second(right, zoom):
    found = motion.camera_motion(drifting(12, right, zoom), FPS)
    assert found.right == pytest.approx(right, abs=0.03)
    assert found.zoom == pytest.approx(zoom, abs=0.03)
    assert abs(found.down) < 0.02 and abs(found.roll) < 0.02


def test_camera_moves_are_named_and_an_even_picture_names_none():
    assert motion.camera_motion(drifting(12, right=0.2), FPS).name == "dolly right"
    assert motion.camera_motion(drifting(12, zoom=-0.2), FPS).name == "dolly out"
    assert motion.camera_motion(drifting(12), FPS).name == "static"
    nothing = motion.camera_motion(np.full((12, 64, 64, 3), 90, np.uint8), FPS)
    assert nothing.confidence == 0


def test_motion_amount_is_the_speed_and_jitter_is_not_smooth():
    steady = motion.optical_flow(drifting(12, right=0.3))
    assert motion.motion_amount(steady, FPS) == pytest.approx(0.3, rel=0.1)
    shaken = np.concatenate([drifting(13, 0.6)[::6], drifting(13, 0.6)[6::-6]] * 3)
    assert (
        motion.motion_smoothness(steady)
        > 0.8
        > motion.motion_smoothness(motion.optical_flow(shaken))
    )


# Sound.


def test_a_sine_of_known_level_has_the_loudness_that_bs1770_gives_it():
    t = np.arange(2 * 48000) / 48000
    tone = Audio(np.sin(2 * np.pi * 997 * t)[None].astype(np.float32), 48000)
    assert sound.loudness_lufs(tone) == pytest.approx(-3.01, abs=0.05)  # ITU-R BS.1770, note 3
    assert sound.loudness_lufs(Audio(np.zeros((2, RATE), np.float32), RATE)) is None
    assert sound.peak_dbfs(tone) == pytest.approx(0, abs=0.01)


@few
@given(gain=st.floats(1.3, 6.0))
def test_clipping_is_found_where_the_wave_is_cut_and_nowhere_else(gain):
    t = np.arange(RATE) / RATE
    wave = 0.9 * np.sin(2 * np.pi * 110 * t)
    assert sound.clipped_spans(Audio(wave[None].astype(np.float32), RATE)) == ()
    cut = np.clip(gain * wave, -0.95, 0.95)[None].astype(np.float32)
    spans = sound.clipped_spans(Audio(cut, RATE))
    assert sum(s.duration_s for s in spans) == pytest.approx(np.mean(np.abs(cut) >= 0.9499), 0.05)


@few
@given(start=st.integers(0, 60), length=st.integers(25, 90))
def test_silence_is_found_to_ten_milliseconds(start, length):
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 2 * RATE)).astype(np.float32)
    noise[:, start * 160 : (start + length) * 160] = 0
    (span,) = sound.silent_spans(Audio(noise, RATE))
    assert span.start_s == pytest.approx(start / 100)
    assert span.end_s == pytest.approx((start + length) / 100)


@few
@given(hz=st.floats(80, 6000))
def test_a_whistle_under_noise_is_found_at_its_frequency_and_noise_alone_is_none(hz):
    noise = 0.1 * np.random.default_rng(1).standard_normal(2 * RATE).astype(np.float32)
    assert sound.lasting_tone(Audio(noise[None], RATE)) is None
    t = np.arange(2 * RATE) / RATE
    whistled = noise + 0.1 * np.sin(2 * np.pi * hz * t).astype(np.float32)
    found = sound.lasting_tone(Audio(whistled[None], RATE))
    assert found is not None and found.hz == pytest.approx(hz, abs=8)
    assert sound.lasting_tone(clicks([0.3, 1.0, 2.2])) is None


@few
@given(times=st.lists(st.integers(2, 28), min_size=1, max_size=5, unique=True))
def test_onsets_are_heard_within_six_milliseconds(times):
    planted = sorted(t / 10 + 0.013 for t in times)
    heard = sync.sound_events(clicks(planted))
    assert np.allclose(heard.times_s, planted, atol=0.006)


# Sync.


@few
@given(offset_ms=st.integers(-400, 400), seed=st.integers(0, 1000))
def test_an_offset_between_irregular_events_is_recovered_to_the_millisecond(offset_ms, seed):
    rng = np.random.default_rng(seed)
    seen = np.cumsum(rng.uniform(0.25, 0.7, 6))
    heard = seen + offset_ms / 1000
    found = sync.best_offset(
        sync.Events.at(tuple(seen), 6.0), sync.Events.at(tuple(heard[heard > 0]), 6.0)
    )
    assert found is not None
    assert found.ms == pytest.approx(offset_ms, abs=2)
    assert found.score > 0.9


@pytest.mark.parametrize("offset_ms", [-300, 0, 250])
def test_the_offset_of_a_jumping_square_and_its_clicks_is_recovered(offset_ms):
    fps, times = 24.0, (0.5, 1.1, 1.9, 2.4)
    frames = np.full((72, 64, 64, 3), 60, np.uint8)
    x, step = 20.0, 1.0
    for index in range(72):
        x += step
        frames[index, 24:36, round(x) : round(x) + 12] = 220
        if any(abs(index / fps - time) < 0.5 / fps for time in times):
            step = -step
    found = sync.av_offset(frames, fps, clicks(np.array(times) + offset_ms / 1000))
    assert found is not None and found.ms == pytest.approx(offset_ms, abs=30)


def test_nothing_seen_or_nothing_heard_has_no_offset():
    still = np.full((24, 64, 64, 3), 60, np.uint8)
    assert sync.av_offset(still, FPS, clicks([0.5])) is None
    silence = Audio(np.zeros((2, 2 * RATE), np.float32), RATE)
    assert sync.av_offset(drifting(24, 0.3), FPS, silence) is None


def test_a_report_names_the_worst_fault_first_and_leaves_a_good_clip_alone():
    frames = drifting(24, right=0.2)
    noise = 0.1 * np.random.default_rng(2).standard_normal((2, 2 * RATE)).astype(np.float32)
    assert report.measure(frames, FPS, Audio(noise, RATE)).faults == {}
    frames[4:22] = frames[4]
    loud = np.clip(40 * noise, -1, 1)
    faults = report.measure(frames, FPS, Audio(loud, RATE)).faults
    assert list(faults) == ["clipped", "frozen", "cuts"]
