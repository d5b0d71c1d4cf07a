"""Defects are found where they are, what rests is left alone, a retake touches its span alone."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_core.types import AV
from aiprod_pipelines import heal, media
from aiprod_pipelines.cli import app
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.metrics import sync
from aiprod_pipelines.retake import RetakePipeline
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

FPS, RATE = 12.0, 16000


def moving(num_frames: int = 25) -> np.ndarray:
    """A disc that jumps about on a soft texture, with a little grain: uint8 (F, 64, 64, 3)."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.uniform(60, 190, (64, 64)).astype(np.float32), (0, 0), 4)
    frames = []
    for t in range(num_frames):
        frame = np.repeat(texture[..., None], 3, -1).copy()
        cv2.circle(frame, (int(32 + 20 * np.sin(t / 3)), 40), 8, (220, 40, 40), -1)
        frames.append(frame + rng.normal(0, 2, frame.shape))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def hum(duration_s: float = 25 / FPS, level: float = 0.3) -> media.Audio:
    noise = np.random.default_rng(1).normal(0, level / 3, (2, round(duration_s * RATE)))
    return media.Audio(noise.clip(-0.9, 0.9).astype(np.float32), RATE)


def clicks(times_s, duration_s: float = 25 / FPS) -> media.Audio:
    """Thuds, and between them the noise that a vocoder leaves in pauses."""
    t = np.arange(round(duration_s * RATE)) / RATE
    wave = sum(
        (t >= at) * np.exp(-np.maximum(t - at, 0) / 0.03) * np.sin(4400 * np.maximum(t - at, 0))
        for at in times_s
    )
    noise = np.random.default_rng(2).normal(0, 1e-4, (2, len(t)))
    return media.Audio((0.5 * np.stack([wave, wave]) + noise).astype(np.float32), RATE)


def found_in(frames: np.ndarray, audio: media.Audio) -> dict[str, tuple[float, float]]:
    defects = [*heal.picture_defects(frames, FPS, audio), *heal.sound_defects(audio)]
    return {d.kind: (round(d.start_s * FPS, 2), round(d.end_s * FPS, 2)) for d in defects}


def test_a_healthy_clip_has_no_defect_and_a_quiet_one_neither():
    assert found_in(moving(), hum()) == {}
    assert found_in(moving(), clicks([0.4, 1.2])) == {}


@pytest.mark.parametrize("kind", ["frozen", "black", "grey", "seam"])
def test_what_is_wrong_with_the_picture_is_found_where_it_is(kind):
    frames = moving()
    span = slice(7, 15)
    if kind == "seam":
        frames[span, :, 24:] = np.clip(frames[span, :, 24:].astype(int) + 20, 0, 255)
    else:
        frames[span] = {"frozen": frames[7], "black": 1, "grey": 120}[kind]
    assert found_in(frames, hum()) == {kind: (7, 15)}


def test_a_row_seam_is_found_and_a_horizon_is_none():
    frames = moving().astype(int)
    frames[:, 45:] -= 40
    horizon = frames.clip(0, 255).astype(np.uint8)
    assert found_in(horizon, hum()) == {}
    empty = horizon.copy()
    empty[4:10] = 128
    assert found_in(empty, hum()) == {"grey": (4, 10)}
    frames[10:16, 20:] += 25
    assert found_in(frames.clip(0, 255).astype(np.uint8), hum()) == {"seam": (10, 16)}


def test_what_has_come_to_rest_in_silence_is_not_frozen_and_what_still_sounds_is():
    frames = moving()
    frames[12:] = frames[12]
    assert found_in(frames, clicks([0.3, 0.9])) == {}
    assert found_in(frames, hum()) == {"frozen": (12, 25)}


def test_silence_is_a_defect_where_all_is_silent_or_the_signal_is_gone():
    nothing = media.Audio(np.zeros((2, round(25 / FPS * RATE)), np.float32), RATE)
    assert found_in(moving(), nothing) == {"silence": (0, 25)}
    broken = hum()
    broken.samples[:, RATE // 2 : RATE] = 0
    start, end = found_in(moving(), broken)["silence"]
    assert (start, end) == (pytest.approx(6, abs=0.2), pytest.approx(12, abs=0.2))


def falling() -> np.ndarray:
    """A disc that falls, lands at frame 12 and lies."""
    frames = np.full((25, 64, 64, 3), 150, np.uint8)
    for t in range(25):
        height = 8 + 42 * min(t / 12, 1.0) ** 2
        cv2.circle(frames[t], (32, int(height)), 7, (200, 30, 30), -1)
    return frames


def test_sound_that_is_late_as_a_whole_is_found_with_its_delay_and_rolling_noise_is_not():
    assert heal.sync_defects(falling(), FPS, clicks([1.0])) == []
    (late,) = heal.sync_defects(falling(), FPS, clicks([1.4]))
    assert late.kind == "desync" and late.offset_ms == pytest.approx(400, abs=60)
    (early,) = heal.sync_defects(falling(), FPS, clicks([0.6]))
    assert early.offset_ms == pytest.approx(-400, abs=60)
    assert heal.sync_defects(falling(), FPS, hum()) == []


def test_what_sounds_from_the_first_moment_has_not_begun_there():
    """The sound sets in with the clip, 0.4 s before the fall ends."""
    fallen = falling()[7:]
    assert heal.sync_defects(fallen, FPS, clicks([0.02], len(fallen) / FPS)) == []
    assert heal.sync_defects(fallen, FPS, clicks([0.1], len(fallen) / FPS)) != []


@pytest.mark.parametrize(("in_place", "found"), [(0.3, 1), (0.7, 0)])
def test_what_keeps_time_as_it_is_is_not_moved_to_the_next_beat(in_place, found, monkeypatch):
    offset = sync.Offset(400.0, 0.8, in_place)
    monkeypatch.setattr(heal.sync, "best_offset", lambda *_: offset)
    assert len(heal.sync_defects(falling(), FPS, clicks([1.0]))) == found


def test_a_beat_meets_itself_in_place_and_a_beat_later():
    beat = sync.Events.at((0.4, 0.8, 1.2, 1.6), 2.0)
    late = sync.Events.at((0.8, 1.2, 1.6, 2.0), 2.4)
    found = sync.best_offset(beat, late)
    assert found is not None and found.in_place > 0.6


def test_clipping_is_found_where_it_is():
    loud = hum()
    loud.samples[:, 8000:16000] = np.clip(loud.samples[:, 8000:16000] * 8, -1, 1)
    start, end = found_in(moving(), loud)["clipping"]
    assert (start, end) == (pytest.approx(6, abs=0.5), pytest.approx(12, abs=0.5))


@pytest.fixture(scope="module")
def broken(tiny_model: Path) -> tuple[TI2VidOneStagePipeline, Clip]:
    """A clip whose second latent frame of three is not a number."""
    pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")
    clip = pipeline("a red ball bounces", seed=3)
    assert clip.latents.video is not None
    video = clip.latents.video.clone()
    video[:, :, 1, 0, 0] = torch.nan
    return pipeline, replace(clip, latents=AV(video, clip.latents.audio))


def test_a_retake_mends_its_span_and_keeps_every_other_latent_bit_for_bit(broken, monkeypatch):
    pipeline, clip = broken
    monkeypatch.setattr(heal, "picture_defects", lambda *_: [])  # of random weights
    monkeypatch.setattr(heal, "sound_defects", lambda *_: [])
    monkeypatch.setattr(heal, "sync_defects", lambda *_: [])
    clip = replace(clip, request=replace(clip.request, heal=4))
    healed = heal.heal(pipeline, clip)
    assert [d["kind"] for d in healed.healing["mended"]] == ["NaN"] and not healed.healing["left"]
    assert len(healed.healing["retakes"]) == 1 and healed.healing["model_calls"] == 4
    assert healed.latents.video.isfinite().all()
    assert torch.equal(healed.latents.video[:, :, [0, 2]], clip.latents.video[:, :, [0, 2]])
    assert torch.equal(healed.latents.audio, clip.latents.audio)


def test_what_cannot_be_mended_costs_no_more_than_the_budget_and_changes_nothing(
    broken, monkeypatch
):
    pipeline, clip = broken
    clip = replace(
        clip,
        latents=replace(clip.latents, video=clip.latents.video.nan_to_num()),
        request=replace(clip.request, heal=2),
    )
    always = heal.Defect("silence", "audio", 0.0, 0.3)
    monkeypatch.setattr(heal, "find_defects", lambda *_: [always])
    healed = heal.heal(pipeline, clip)
    assert len(healed.healing["retakes"]) == 2 and len(healed.healing["left"]) == 1
    assert healed.latents.video is clip.latents.video and healed.latents.audio is clip.latents.audio
    spans = [(r["start_s"], r["end_s"]) for r in healed.healing["retakes"]]
    assert spans[1][1] > spans[0][1]  # wider from the second on


def test_late_sound_is_moved_and_only_the_gap_is_made(broken, monkeypatch):
    pipeline, clip = broken
    clip = replace(clip, latents=replace(clip.latents, video=clip.latents.video.nan_to_num()))
    clip = replace(clip, request=replace(clip.request, heal=1))
    answers = iter([[heal.Defect("desync", "audio", 0.0, 0.75, 1.0, 330.0)], []])
    monkeypatch.setattr(heal, "find_defects", lambda *_: next(answers))
    healed = heal.heal(pipeline, clip)
    (retake,) = healed.healing["retakes"]
    assert retake["moved_ms"] == 320.0  # 8 latents of 40 ms
    old, new = clip.latents.audio, healed.latents.audio
    assert torch.equal(new[:, :, :8], old[:, :, 8:16])
    assert not torch.equal(new[:, :, -7:], old[:, :, -7:])


def test_the_command_says_what_was_found_and_a_replay_heals_again(tiny_model: Path, tmp_path: Path):
    output = tmp_path / "clip.mp4"
    arguments = ["generate", "a red ball", "-o", str(output), "-m", str(tiny_model), "--heal",
                 "--heal-budget", "1", "--device", "cpu", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["healing"].keys() == {"found", "mended", "left", "retakes", "model_calls"}
    recipe = json.loads(CliRunner().invoke(app, ["inspect", str(output), "--json"]).stdout)
    assert recipe["healing"] == report["healing"] and recipe["request"]["heal"] == 1
    assert CliRunner().invoke(app, ["replay", str(output), "--check"]).exit_code == 0


def test_a_retake_itself_cannot_be_healed(tiny_model: Path, source_clip: Path):
    pipeline = RetakePipeline.from_model(str(tiny_model), device="cpu")
    with pytest.raises(InputError, match="cannot heal"):
        pipeline("a red ball", source=source_clip, heal=2)
