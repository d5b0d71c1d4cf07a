"""Scenes: cuts are found where they are, and the clips are the source frame for frame."""

import json
from pathlib import Path

import numpy as np
import pytest

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_trainer.dataset.scenes import SceneSettings, split_scenes
from aiprod_trainer.dataset.tables import read_clips

CUTS = (0, 18, 40, 60)  # frames at 12 a second


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of one colour each, with a moving bar and a rising tone of steps a second."""
    frames = np.zeros((CUTS[-1], 48, 64, 3), np.uint8)
    colours = ((90, 10, 10), (180, 250, 180), (30, 30, 160))
    for colour, start, end in zip(colours, CUTS, CUTS[1:], strict=False):
        frames[start:end] = colour
    for index in range(len(frames)):
        frames[index, 20:24, index : index + 4] = 255
    samples = np.repeat(np.linspace(-0.5, 0.5, 5), 16000)[None].astype(np.float32)
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    media.write_video(path, [frames], 12, audio=media.Audio(samples, 16000), crf=10)
    return path


def test_clips_are_cut_where_the_scenes_change(film, tmp_path):
    rows, skipped = split_scenes(film, tmp_path, SceneSettings(save_images=1))
    assert skipped == []
    assert [row["num_frames"] for row in rows] == [18, 22, 20]
    assert [row["start_s"] for row in rows] == [0.0, 1.5, 3.333]
    source = np.stack(list(media.read_frames(film)))
    for row, start in zip(rows, CUTS, strict=False):
        clip = np.stack(list(media.read_frames(tmp_path / row["video"])))
        assert len(clip) == row["num_frames"]
        error = np.abs(clip.astype(int) - source[start : start + len(clip)])
        assert error.mean() < 2
        sound = media.probe(tmp_path / row["video"])
        assert sound.audio_codec == "aac"
        assert (tmp_path / row["video"]).with_name(f"{Path(row['video']).stem}-1.jpg").is_file()
    assert [clip.name for clip in read_clips(tmp_path / "scenes.jsonl")] == [
        "film-scene-001.mp4",
        "film-scene-002.mp4",
        "film-scene-003.mp4",
    ]


def test_a_second_run_keeps_finished_clips_and_makes_missing_ones_alike(film, tmp_path):
    split_scenes(film, tmp_path, SceneSettings())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    middle = tmp_path / "film-scene-002.mp4"
    middle.unlink()
    kept = (tmp_path / "film-scene-001.mp4").stat().st_mtime_ns
    split_scenes(film, tmp_path, SceneSettings())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (tmp_path / "film-scene-001.mp4").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match="max_scenes null before, now 1"):
        split_scenes(film, tmp_path, SceneSettings(max_scenes=1))


@pytest.mark.parametrize("detector", ["content", "adaptive", "histogram"])
def test_limits_hold_for_every_detector(film, tmp_path, detector):
    settings = SceneSettings(detector=detector, max_scenes=2, filter_shorter_than=1.55)
    rows, _ = split_scenes(film, tmp_path, settings)
    assert [row["num_frames"] for row in rows] == [22, 20]


def test_only_the_asked_stretch_is_cut(film, tmp_path):
    rows, _ = split_scenes(film, tmp_path, SceneSettings(skip_start=2.0, duration=2.0))
    assert (rows[0]["start_s"], rows[-1]["end_s"]) == (2.0, 4.0)
    assert sum(row["num_frames"] for row in rows) == 24


def test_a_broken_source_is_listed_and_the_others_are_cut(film, tmp_path):
    folder = tmp_path / "films"
    (folder / "x").mkdir(parents=True)
    (folder / "x" / "film.mp4").write_bytes(film.read_bytes())
    (folder / "broken.mp4").write_bytes(b"nothing")
    rows, skipped = split_scenes(folder, tmp_path / "out", SceneSettings())
    assert [row["video"] for row in rows] == [f"x-film-scene-00{i}.mp4" for i in (1, 2, 3)]
    [line] = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == skipped[0]
    assert "broken.mp4" in skipped[0]["reason"]
    with pytest.raises(InputError, match="not one scene"):
        split_scenes(folder / "broken.mp4", tmp_path / "none", SceneSettings())
