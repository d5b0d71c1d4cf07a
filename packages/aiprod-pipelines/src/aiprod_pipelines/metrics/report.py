"""All weight-free measures of one clip, as numbers with their units in their names."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from aiprod_pipelines import media
from aiprod_pipelines.metrics import motion, picture, sound, sync
from aiprod_pipelines.metrics.picture import Span

MAX_SIDE = 512  # larger pictures are reduced to this before they are measured


@dataclass(frozen=True)
class Report:
    """`figures` are numbers (None where there is nothing to measure), `spans` where faults lie,
    `faults` their names, worst first, with `severity` 0 to 1 each."""

    figures: dict[str, float | str | None]
    spans: dict[str, tuple[Span, ...]]
    faults: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        spans = {name: [asdict(span) for span in found] for name, found in self.spans.items()}
        return {"figures": self.figures, "spans": spans, "faults": self.faults}


def measure_file(path: str | Path) -> Report:
    """Measures a video or a sound. Raises InputError when it can be neither."""
    frames, fps, audio = read_clip(path)
    return measure(frames, fps, audio)


def read_clip(path: str | Path) -> tuple[np.ndarray | None, float, media.Audio | None]:
    """Frames of at most `MAX_SIDE` pixels, their rate, and the sound; None for an absent track."""
    info = media.probe(path)
    audio = media.read_span(path, 0.0, info.duration_s) if info.audio_codec else None
    if info.width is None or info.height is None:
        return None, 0.0, audio
    scale = min(MAX_SIDE / max(info.width, info.height), 1.0)
    frames = []
    for frame in media.read_frames(path):
        size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
        frames.append(frame if scale == 1 else cv2.resize(frame, size, interpolation=3))
    return np.stack(frames), info.fps or 24.0, audio


def measure(frames: np.ndarray | None, fps: float, audio: media.Audio | None) -> Report:
    """Measures frames (F, H, W, 3) in 0..255 and a sound, either of which may be absent."""
    figures: dict[str, float | str | None] = {}
    flow: np.ndarray | None = None
    spans: dict[str, tuple[Span, ...]] = {}
    if frames is not None:
        spans["nonfinite"] = picture.nonfinite_spans(frames, fps)
        shown = np.nan_to_num(frames) if spans["nonfinite"] else frames
        spans |= {
            "frozen": picture.frozen_spans(shown, fps),
            "empty": picture.empty_spans(shown, fps),
            "black": picture.black_spans(shown, fps),
        }
        flow = motion.optical_flow(shown)
        camera = motion.camera_motion(shown, fps)
        strongest = picture.seam(shown)
        figures |= {
            "duration_s": len(frames) / fps,
            "flicker_levels": picture.flicker(shown),
            "motion_widths_per_s": motion.motion_amount(flow, fps),
            "motion_smoothness": motion.motion_smoothness(flow),
            "camera": camera.name,
            "camera_right_widths_per_s": camera.right,
            "camera_down_widths_per_s": camera.down,
            "camera_log_zoom_per_s": camera.zoom,
            "camera_confidence": camera.confidence,
            "cuts": float(len(picture.cuts(shown, fps))),
            "seam_levels": strongest.levels if strongest else None,
        }
    if audio is not None:
        spans |= {"clipped": sound.clipped_spans(audio), "silent": sound.silent_spans(audio)}
        tone = sound.lasting_tone(audio)
        peak = sound.peak_dbfs(audio)
        figures |= {
            "sound_s": audio.duration_s,
            "loudness_lufs": sound.loudness_lufs(audio),
            "peak_dbfs": peak if np.isfinite(peak) else None,
            "tone_hz": tone.hz if tone else None,
            "tone_prominence_db": tone.prominence_db if tone else None,
        }
    if frames is not None and audio is not None:
        offset = sync.av_offset(frames, fps, audio, flow=flow)
        figures |= {
            "av_offset_ms": offset.ms if offset else None,
            "av_offset_score": offset.score if offset else None,
        }
    for name, found in spans.items():
        figures[f"{name}_s"] = sum(span.duration_s for span in found)
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    return Report(rounded, spans, _faults(rounded))


def _faults(figures: dict[str, Any]) -> dict[str, float]:
    """What a viewer would call a fault, and how bad it is: mostly the share of the clip it spoils.

    Stillness, silence and tones can be meant; they weigh in full only where they fill the clip.
    """
    length = figures.get("duration_s") or figures.get("sound_s") or 1.0

    def share(name: str, of_s: float = length) -> float:
        return min((figures.get(f"{name}_s") or 0.0) / of_s, 1.0)

    severity = {
        "NaN": share("nonfinite"),
        "black": share("black"),
        "empty": share("empty"),
        "frozen": share("frozen") ** 2,
        "silent": share("silent") ** 2,
        "clipped": min(share("clipped", 0.1), 1.0),
        "flicker": min(figures.get("flicker_levels", 0.0) / 10, 1.0),
        "cuts": min(figures.get("cuts", 0.0) / 4, 1.0),
        "tone": min((figures.get("tone_prominence_db") or 0.0) / 60, 1.0),
    }
    worst_first = sorted(severity.items(), key=lambda item: -item[1])
    return {name: round(value, 3) for name, value in worst_first if value >= 0.1}
