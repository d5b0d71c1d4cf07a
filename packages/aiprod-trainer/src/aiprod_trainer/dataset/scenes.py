"""Cuts long footage into clips of one scene each, where PySceneDetect finds the cuts.

OUT/NAME-scene-001.mp4, ...    H.264 with sound, frame for frame of the source
OUT/scenes.jsonl               a table for the other commands: video, source, start_s, end_s, ...
OUT/skipped.jsonl              sources that cannot be read, with the reason
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_pipelines.progress import Progress
from aiprod_trainer.dataset.clips import jpeg
from aiprod_trainer.dataset.journal import claim, sole_run, write_whole
from aiprod_trainer.dataset.tables import VIDEO_SUFFIXES, media_files, write_table

# The detector's class in PySceneDetect, and its name for the threshold.
DETECTORS = {
    "content": ("ContentDetector", "threshold"),
    "adaptive": ("AdaptiveDetector", "adaptive_threshold"),
    "threshold": ("ThresholdDetector", "threshold"),
    "histogram": ("HistogramDetector", "threshold"),
}
CLIP_CRF = 17  # visually without loss: these clips are sources, not results


@dataclass(frozen=True)
class SceneSettings:
    """How to cut. Lengths are in seconds; `threshold` None is the detector's own."""

    detector: str = "content"
    threshold: float | None = None
    min_scene_length: float = 0.6
    filter_shorter_than: float = 0.0
    max_scenes: int | None = None  # of a source
    skip_start: float = 0.0
    skip_end: float = 0.0
    duration: float | None = None  # of the source, from `skip_start`
    downscale: int | None = None  # for detection only; None picks one by the size
    frame_skip: int = 0
    save_images: int = 0  # of each scene

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise InputError(
                f"detector must be one of {', '.join(DETECTORS)}; got {self.detector}."
            )


def split_scenes(
    source: Path,
    folder: Path,
    settings: SceneSettings,
    *,
    stats_file: Path | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Cuts a video, or every video of a folder. Returns the rows of both lists.

    Finished clips are kept when it is run again. Raises InputError when no source can be used.
    """
    progress = progress or Progress()
    if not source.exists():
        raise InputError(f"{source}: no such file or folder.")
    sources = media_files(source, VIDEO_SUFFIXES) if source.is_dir() else [source]
    if stats_file is not None and len(sources) > 1:
        raise InputError("--stats-file is written for one video; give one.")
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with sole_run(folder):
        claim(folder / "scenes.json", asdict(settings), overwrite=overwrite)
        with progress.stage("split scenes", len(sources)) as advance:
            for path in sources:
                name = path.stem
                if source.is_dir():  # a.mp4 of one folder is not that of another
                    name = "-".join(path.relative_to(source).with_suffix("").parts)
                try:
                    rows += _split(path, folder, name, settings, stats_file, overwrite)
                except InputError as error:
                    skipped.append({"video": str(path), "reason": str(error)})
                advance(1)
        lines = "".join(json.dumps(row) + "\n" for row in skipped)
        write_whole(folder / "skipped.jsonl", lines.encode())
        if not rows:
            reason = f"; the first: {skipped[0]['reason']}" if skipped else ""
            raise InputError(f"{source}: gives not one scene{reason}")
        write_table(folder / "scenes.jsonl", rows)
    return rows, skipped


def find_scenes(
    path: Path, settings: SceneSettings, stats_file: Path | None = None
) -> list[tuple[float, float]]:
    """(start, end) in seconds of each scene, in order. A video without a cut is one scene."""
    import scenedetect

    info = media.probe(path)
    if not info.fps:
        raise InputError(f"{path}: no video track in this file.")
    kind, threshold_name = DETECTORS[settings.detector]
    options: dict[str, Any] = {"min_scene_len": max(1, round(settings.min_scene_length * info.fps))}
    if settings.threshold is not None:
        options[threshold_name] = settings.threshold
    stats = scenedetect.StatsManager() if stats_file is not None else None
    manager = scenedetect.SceneManager(stats)
    manager.add_detector(getattr(scenedetect, kind)(**options))
    if settings.downscale is not None:
        manager.auto_downscale, manager.downscale = False, settings.downscale
    end_s = info.duration_s - settings.skip_end
    if settings.duration is not None:
        end_s = min(end_s, settings.skip_start + settings.duration)
    if end_s <= settings.skip_start:
        raise InputError(f"{path}: nothing is left of its {info.duration_s:.2f} s.")
    try:
        video = scenedetect.open_video(str(path), backend="pyav", suppress_output=True)
        if settings.skip_start:
            video.seek(float(settings.skip_start))
        manager.detect_scenes(video, end_time=float(end_s), frame_skip=settings.frame_skip)
    except (scenedetect.VideoOpenFailure, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    if stats is not None and stats_file is not None:
        stats.save_to_csv(str(stats_file))
    found = manager.get_scene_list(start_in_scene=True)
    scenes = [(start.seconds, min(end.seconds, end_s)) for start, end in found]
    scenes = [(a, b) for a, b in scenes if b - a >= settings.filter_shorter_than and b > a]
    return scenes[: settings.max_scenes]


def _split(
    path: Path,
    folder: Path,
    name: str,
    settings: SceneSettings,
    stats_file: Path | None,
    overwrite: bool,
) -> list[dict[str, Any]]:
    scenes = find_scenes(path, settings, stats_file)
    info = media.probe(path)
    fps = info.fps or 24.0
    audio = None
    if info.audio_codec is not None:
        audio = media.read_audio(path, channels=2 if (info.audio_channels or 0) > 2 else None)
    frames = media.read_frames_at(path, fps, 2**62)
    position = 0
    rows = []
    for number, (start_s, end_s) in enumerate(scenes, 1):
        start, end = round(start_s * fps), round(end_s * fps)
        clip = folder / f"{name}-scene-{number:03d}.mp4"
        rows.append(
            {
                "video": clip.name,
                "source": str(path),
                "start_s": round(start / fps, 3),
                "end_s": round(end / fps, 3),
                "num_frames": end - start,
            }
        )
        if clip.is_file() and not overwrite:
            continue
        scene = itertools.islice(frames, start - position, end - position)
        position = end
        sound = _cut(audio, start / fps, end / fps) if audio is not None else None
        pictures = _pictures(clip, settings.save_images, end - start)
        written = media.write_video(clip, _kept(scene, pictures), fps, audio=sound, crf=CLIP_CRF)
        if written < end - start:
            rows[-1] |= {"num_frames": written, "end_s": round((start + written) / fps, 3)}
    return rows


def _kept(frames: Iterator[media.Frame], pictures: dict[int, Path]) -> Iterator[media.Frames]:
    """Passes frames on as chunks of one, and saves those that are asked for."""
    for index, frame in enumerate(frames):
        if index in pictures:
            write_whole(pictures[index], jpeg(frame))
        yield frame[None]


def _pictures(clip: Path, count: int, num_frames: int) -> dict[int, Path]:
    """Which frames of a scene are saved as images, evenly from its inside, and where."""
    places = np.linspace(0, num_frames - 1, count + 2)[1:-1].round().astype(int)
    return {int(p): clip.with_name(f"{clip.stem}-{i}.jpg") for i, p in enumerate(places, 1)}


def _cut(audio: media.Audio, start_s: float, end_s: float) -> media.Audio:
    first, last = round(start_s * audio.sample_rate), round(end_s * audio.sample_rate)
    return media.Audio(np.ascontiguousarray(audio.samples[:, first:last]), audio.sample_rate)
