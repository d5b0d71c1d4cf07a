"""Takes that mend themselves: the clip is judged, and the guilty span of the guilty modality made
anew, within a budget.

    clip = pipeline("a red ball bounces", heal=4)  # at most 4 retakes
    print(clip.healing)

Judged is what a viewer gets, the decoded picture and sound, by measures that need no network
(`metrics`). A retake keeps every latent outside its span bit for bit. A sound that is late or early
as a whole is first moved in latents, so that only the gap at one end has to be made. A retake that
leaves the clip no better is thrown away, and the next begins from other noise over a wider span.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aiprod_core.types import AV
from aiprod_pipelines import encoding, media, stages
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.metrics import motion, picture, sound, sync
from aiprod_pipelines.metrics.picture import Span
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.plan import MODEL_CALLS
from aiprod_pipelines.retake import open_window

SEED_OFFSET = 20_000  # between the seeds of a clip's retakes and its own

FROZEN_S = 0.35  # shorter stops are seen in ordinary motion
SOUNDING_DB = -45.0
SILENT_CLIP_DB = -50.0  # peak, for a clip whose sound was asked for
DROPPED_DB = -110.0  # below the noise that vocoders leave in pauses, some -90 dB
LEVEL_S = 0.01  # silence is told to this length
CLIPPED_S = 0.0005  # a single clipped sample is not heard
DESYNC_MS, DESYNC_SCORE = 250.0, 0.6  # beyond the error of `sync.best_offset` on unknown pictures
DESYNC_GAIN, BEGUN_S = 0.25, 0.06
ONSET_DB = 10.0  # by which what is heard as an event rises at once; lasting noise wavers by less
JOINED_S = 0.3  # defects of one kind this near are one


@dataclass(frozen=True)
class Defect:
    """What is wrong, from `start_s` to `end_s`. `severity` is 1 for what spoils its span and adds
    the share of the clip that it covers; `offset_ms` is how late a sound is."""

    kind: str  # NaN, black, grey, frozen, seam, clipping, silence or desync
    modality: str  # video or audio
    start_s: float
    end_s: float
    severity: float = 1.0
    offset_ms: float | None = None


@dataclass
class Healing:
    """What was found, tried, mended and left. A retake says what it was for and whether it was
    kept; `moved_ms` is by how much it brought the whole sound forward."""

    found: list[Defect]
    retakes: list[dict[str, Any]] = field(default_factory=list)
    left: list[Defect] = field(default_factory=list)

    @property
    def mended(self) -> list[Defect]:
        return [d for d in self.found if not any(_is_same(d, other) for other in self.left)]

    @property
    def model_calls(self) -> int:
        return sum(retake["model_calls"] for retake in self.retakes)

    def to_dict(self) -> dict[str, Any]:
        lists = {"found": self.found, "mended": self.mended, "left": self.left}
        plain = {name: [asdict(defect) for defect in found] for name, found in lists.items()}
        return plain | {"retakes": self.retakes, "model_calls": self.model_calls}

    def summary(self) -> str:
        if not self.found:
            return "no defect found"
        parts = [
            f"{d.kind} {d.start_s:.2f}-{d.end_s:.2f} s {'left' if d in self.left else 'mended'}"
            for d in [*self.mended, *self.left]
        ]
        return f"{', '.join(parts)}; {len(self.retakes)} retakes, {self.model_calls} model calls"


def heal(pipeline: Pipeline, clip: Clip) -> Clip:
    """The clip with its defects mended as far as `request.heal` retakes go, and `healing` set."""
    take = decode(clip)
    defects = find_defects(clip, take)
    healing = Healing(defects)
    tries: dict[str, int] = {}
    for number in range(clip.request.heal):
        # Fewest tries first, then as they were found: the picture before the sound that follows it.
        defect = min(defects, key=lambda d: tries.get(d.kind, 0), default=None)
        if defect is None:
            break
        attempt = tries[defect.kind] = tries.get(defect.kind, 0) + 1
        seed = clip.request.seed + SEED_OFFSET + number
        retaken, entry = _retake(pipeline, clip, defect, attempt, seed)
        made = decode(retaken, take, defect.modality)
        now = find_defects(retaken, made)
        entry["kept"] = _badness(now) < _badness(defects)
        healing.retakes.append(entry)
        if entry["kept"]:
            clip, take, defects = retaken, made, now
    healing.left = defects
    clip.healing = healing.to_dict()
    clip.progress.note(f"heal: {healing.summary()}")
    return clip


# Judging.


class Take(NamedTuple):
    """What a clip's latents decode to; None for what is absent or cannot be decoded."""

    frames: np.ndarray | None  # (F, H, W, 3) uint8
    audio: media.Audio | None


def decode(clip: Clip, before: Take | None = None, modality: str = "both") -> Take:
    """Decodes a clip, or the modality that was made anew since `before`."""
    with torch.inference_mode():
        if before is not None and modality == "audio":
            frames = before.frames
        elif clip.latents.video is None or not clip.latents.video.isfinite().all():
            frames = None
        else:
            frames = torch.cat(list(clip.frames())).numpy()
        if before is not None and modality == "video":
            return Take(frames, before.audio)
        latent = clip.latents.audio
        return Take(frames, clip.audio if latent is None or latent.isfinite().all() else None)


def find_defects(clip: Clip, take: Take) -> list[Defect]:
    """The defects of a clip's picture, then of its sound, each kind from the first on."""
    request, (frames, audio) = clip.request, take
    duration_s = request.shape.duration_s
    found: list[Defect] = []
    for name in ("video", "audio"):
        latent = getattr(clip.latents, name)
        if latent is not None and (bad := _nonfinite(latent)) is not None:
            edges = np.linspace(0, duration_s, latent.shape[2] + 1)
            if name == "video":  # the codec's first latent is a single frame
                starts = (np.arange(latent.shape[2]) - 1) * clip.models.profile.scale.time + 1
                ends = request.shape.num_frames
                edges = np.append(np.maximum(starts, 0), ends) / request.shape.fps
            span = Span(float(edges[bad[0]]), float(edges[bad[1]]))
            found += _defects("NaN", name, [span], duration_s)
    with clip.progress.stage("judge"):
        if frames is not None:
            found += picture_defects(frames, request.shape.fps, audio)
        if audio is not None and request.audio is None:  # a given sound is kept as it is
            is_seen_well = frames is not None and not found  # a seam that comes is no event
            found += sound_defects(audio)
            if frames is not None and is_seen_well:
                found += sync_defects(frames, request.shape.fps, audio)
    return found


def picture_defects(
    frames: np.ndarray, fps: float, audio: media.Audio | None = None
) -> list[Defect]:
    """Of frames (F, H, W, 3) uint8; the sound tells whether what rests does so by right."""
    duration_s = len(frames) / fps
    black = picture.black_spans(frames, fps)
    grey = [s for s in picture.empty_spans(frames, fps) if not _overlaps(s, black)]
    frozen = [
        span
        for span in picture.frozen_spans(frames, fps, min_s=FROZEN_S)
        if not _overlaps(span, [*black, *grey]) and _is_stuck(span, duration_s, audio)
    ]
    seams = [s for s in picture.seam_spans(frames, fps) if not _overlaps(s, [*black, *grey])]
    kinds = {"black": black, "grey": grey, "frozen": frozen, "seam": seams}
    return [d for kind, spans in kinds.items() for d in _defects(kind, "video", spans, duration_s)]


def sound_defects(audio: media.Audio) -> list[Defect]:
    """Of a sound that was asked for. Silence is a defect where there is nothing else, and where
    the signal itself is gone: pauses are heard in a decoded sound as a little noise."""
    duration_s = audio.duration_s
    if sound.peak_dbfs(audio) < SILENT_CLIP_DB:
        return _defects("silence", "audio", [Span(0.0, duration_s)], duration_s)
    clipped = sound.clipped_spans(audio, shortest=2)
    if sum(span.duration_s for span in clipped) < CLIPPED_S:
        clipped = ()
    return [
        *_defects("clipping", "audio", clipped, duration_s),
        *_defects(
            "silence",
            "audio",
            sound.silent_spans(audio, below_db=DROPPED_DB, min_s=0.1),
            duration_s,
        ),
    ]


def sync_defects(frames: np.ndarray, fps: float, audio: media.Audio) -> list[Defect]:
    """Sound that is late or early as a whole, where something sudden is seen and heard."""
    seen = sync.motion_events(motion.optical_flow(frames), fps)
    heard = sync.sound_events(audio)
    levels, step_s = sound.levels_db(audio, 0.01)
    levels = np.pad(np.maximum(levels, sound.SILENT_DB), (6, 4), mode="edge")
    at = (heard.times_s / step_s).astype(int)  # in the padded levels: 60 ms before
    rise = np.array([levels[i + 6 : i + 10].max() - levels[i : i + 5].max() for i in at])
    is_sudden = rise >= ONSET_DB if len(at) else np.zeros(0, dtype=bool)
    is_sudden &= heard.times_s >= BEGUN_S  # what sounds from the start did not begin there
    heard = heard._replace(times_s=heard.times_s[is_sudden], weights=heard.weights[is_sudden])
    offset = sync.best_offset(seen, heard, max(0.03, 0.6 / fps))
    if offset is None or abs(offset.ms) < DESYNC_MS or offset.score < DESYNC_SCORE:
        return []
    if offset.score - offset.in_place < DESYNC_GAIN:  # it keeps time nearly as well as it is
        return []
    return [Defect("desync", "audio", 0.0, audio.duration_s, 1.0, round(offset.ms, 1))]


def _is_stuck(span: Span, duration_s: float, audio: media.Audio | None) -> bool:
    """Whether a still picture should move: between motions, or while something is heard. What hangs
    still before it begins, and lies still after it has ended, does so by right."""
    is_inner = span.start_s > 0 and span.end_s < duration_s - 1e-6
    if is_inner or audio is None:
        return True
    levels, step_s = sound.levels_db(audio, 0.05)
    # Not the first tenth of a second: what has just come to rest still rings.
    start = int((span.start_s + 0.1) / step_s) if span.start_s > 0 else 0
    return bool((levels[start : int(span.end_s / step_s)] > SOUNDING_DB).mean() > 0.3)


def _defects(kind: str, modality: str, spans: Sequence[Span], duration_s: float) -> list[Defect]:
    """Neighbouring spans joined, as defects."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.start_s - joined[-1].end_s < JOINED_S:
            joined[-1] = Span(joined[-1].start_s, span.end_s)
        else:
            joined.append(span)
    return [
        Defect(kind, modality, s.start_s, s.end_s, round(1 + s.duration_s / duration_s, 3))
        for s in joined
    ]


def _nonfinite(latent: Tensor) -> tuple[int, int] | None:
    """(start, stop) of the latent frames (1, C, T, ...) that hold all NaN and infinities."""
    bad = ~torch.isfinite(latent).all(dim=1).flatten(2).all(dim=-1)[0]  # (T,)
    index = bad.nonzero().flatten()
    return (int(index[0]), int(index[-1]) + 1) if len(index) else None


def _overlaps(span: Span, others: Sequence[Span]) -> bool:
    return any(span.start_s < o.end_s and o.start_s < span.end_s for o in others)


def _is_same(defect: Defect, other: Defect) -> bool:
    span = Span(other.start_s, other.end_s)
    return defect.kind == other.kind and _overlaps(Span(defect.start_s, defect.end_s), [span])


def _badness(defects: Sequence[Defect]) -> float:
    return sum(defect.severity for defect in defects)


# Retaking.


def _retake(
    pipeline: Pipeline, clip: Clip, defect: Defect, attempt: int, seed: int
) -> tuple[Clip, dict[str, Any]]:
    """The clip with the defect's span made anew, and what was done."""
    models, request, latents = pipeline.models, clip.request, clip.latents
    duration_s = request.shape.duration_s
    slack_s = LEVEL_S if defect.modality == "audio" else 0.0
    start_s, end_s = max(0.0, defect.start_s - slack_s), min(duration_s, defect.end_s + slack_s)
    moved_ms = None
    if defect.kind == "desync" and attempt == 1:
        assert defect.offset_ms is not None and latents.audio is not None
        steps = round(defect.offset_ms / 1000 * models.audio_config.latents_per_second)
        moved_ms = round(steps / models.audio_config.latents_per_second * 1000, 1)
        latents = AV(latents.video, torch.roll(latents.audio, -steps, dims=2))
        gap_s = abs(moved_ms) / 1000
        start_s, end_s = (duration_s - gap_s, duration_s) if steps > 0 else (0.0, gap_s)
    elif attempt > 1:
        # What a codec has smeared over its neighbours goes with it.
        margin_s = (attempt - 1) * models.profile.scale.time / request.shape.fps
        start_s, end_s = max(0.0, start_s - margin_s), min(duration_s, end_s + margin_s)
    request = replace(
        request, seed=seed, start_time=start_s, end_time=end_s, modality=defect.modality
    )
    sigmas = stages.schedule_of(request)
    progress = clip.progress
    distillation = pipeline.distillation(request) if pipeline.is_distilled else []
    start = AV(_finite(latents.video), _finite(latents.audio))
    states = stages.initial_states(models, request, start)
    states = open_window(states, request)
    # Images that were given are so still, where the span holds their frames.
    states = stages.add_images(
        states, encoding.encode_images(models, request, request.images, progress)
    )
    states = stages.add_keyframes(
        states, encoding.encode_images(models, request, request.keyframes, progress)
    )
    made = stages.finished(
        stages.denoise(
            models,
            request,
            states,
            encoding.encode_prompts(models, request, progress),
            stages.window_generators(models, request),
            progress,
            sigmas=sigmas,
            loras=[*request.loras, *distillation],
            stage="retake",
        )
    )
    entry = {
        "kind": defect.kind,
        "modality": defect.modality,
        "start_s": round(start_s, 4),
        "end_s": round(end_s, 4),
        "moved_ms": moved_ms,
        "seed": seed,
        "model_calls": (len(sigmas) - 1) * MODEL_CALLS.get(request.sampler or "euler", 1),
    }
    return replace(clip, latents=made), entry


def _finite(latent: Tensor | None) -> Tensor | None:
    """Zeros for what is not a number: noise takes its place, but NaN times 0 would stay."""
    return None if latent is None else latent.nan_to_num(0.0, 0.0, 0.0)
