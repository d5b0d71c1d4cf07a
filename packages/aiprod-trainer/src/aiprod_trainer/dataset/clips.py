"""One clip looked at: does all of it decode, which bucket takes it, what is odd about it.

`check_clip` decodes every frame once, so that nothing later meets a damaged file, and reads what
training would see of it, from which it makes a content hash and a thumbnail. It needs no torch.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from PIL import Image

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_pipelines.controls import make_control
from aiprod_trainer.dataset.journal import write_whole
from aiprod_trainer.dataset.tables import IMAGE_SUFFIXES, Clip
from aiprod_trainer.world.contact_sheet import contact_sheet

RESHAPE_MODES = ("center", "random")
CONTROLS = ("canny", "depth", "pose", "blur")
THUMBNAIL_HEIGHT, THUMBNAIL_FRAMES = 96, 4

# A container may announce frames that an edit list hides; more than these are missing ones.
HIDDEN_FRAMES = 2

# What the report warns of.
ENLARGED, CROPPED = 1.5, 0.3  # the factor of a side, the share of a picture
STILL, SILENT = 0.5, 1e-3  # mean change in grey levels, peak


class Bucket(NamedTuple):
    """A size that clips are brought to, in pixels and frames."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a clip's latents, beside the model."""

    buckets: tuple[Bucket, ...]
    fps: float
    reshape_mode: str = "center"
    with_audio: bool = True
    controls: tuple[str, ...] = ()
    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1
    clips_per_part: int = 64

    def as_json(self) -> dict[str, Any]:
        buckets = [str(bucket) for bucket in self.buckets]
        return asdict(self) | {"buckets": buckets, "fps": float(self.fps)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        buckets = parse_buckets(";".join(values["buckets"]))
        return cls(**values | {"buckets": buckets, "controls": tuple(values["controls"])})


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Reads "768x512x49;512x768x49" (width, height, frames). Raises InputError."""
    buckets = []
    for part in text.split(";"):
        sizes = part.strip().split("x")
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
            raise InputError(
                f"resolution buckets are WIDTHxHEIGHTxFRAMES, joined by ;, e.g. "
                f"768x512x49;512x768x49; got {text}."
            )
        buckets.append(Bucket(*map(int, sizes)))
    return tuple(dict.fromkeys(buckets))


def choose_bucket(
    buckets: Sequence[Bucket], height: int, width: int, num_frames: int
) -> Bucket | None:
    """The bucket that keeps most of a clip: nearest in shape, then longest, then largest without
    enlarging. None where the clip is shorter than all of them."""

    def loss(bucket: Bucket) -> tuple[float, int, bool, int]:
        shape = abs(math.log((bucket.width / bucket.height) / (width / height)))
        is_enlarged = bucket.width > width or bucket.height > height
        area = bucket.width * bucket.height
        return round(shape, 6), -bucket.num_frames, is_enlarged, area if is_enlarged else -area

    fitting = [bucket for bucket in buckets if bucket.num_frames <= num_frames]
    return min(fitting, key=loss, default=None)


def check_clip(task: dict[str, Any]) -> dict[str, Any]:
    """A task of `run_tasks`: {clip, settings, thumbnails} to a record of what was found.

    A clip that cannot be used has a "problem", one sentence; nothing that a file does raises.
    """
    clip, settings = Clip.from_json(task["clip"]), Settings.from_json(task["settings"])
    try:
        return _examine(clip, settings, Path(task["thumbnails"]))
    except InputError as error:
        return {"problem": str(error)}
    except Exception as error:  # other people's files and decoders: anything can happen
        return {"problem": f"{clip.name}: {type(error).__name__}: {error}"}


def _examine(clip: Clip, settings: Settings, thumbnails: Path) -> dict[str, Any]:
    infos = {column: verify(path) for column, path in clip.files.items()}
    picture, sound = infos.get("video"), infos.get("audio") or infos.get("video")
    if picture is not None and picture.width is None:
        raise InputError(f"{clip.files['video']}: no video track in this file.")
    if "audio" in infos and infos["audio"].audio_codec is None:
        raise InputError(f"{clip.files['audio']}: no sound track in this file.")
    has_audio = settings.with_audio and sound is not None and sound.audio_codec is not None
    if picture is None and not has_audio:
        raise InputError(f"{clip.name}: a sound alone, and sounds are left out.")
    record: dict[str, Any] = {"has_video": picture is not None, "has_audio": has_audio}

    # Which bucket.
    length = picture or sound
    assert length is not None
    available = _frames_at(length, settings.fps)
    if picture is not None:
        height, width = _upright_size(clip.files["video"])
        bucket = choose_bucket(settings.buckets, height, width, available)
        record |= {"width": width, "height": height, "source_fps": round(picture.fps or 0, 3)}
    else:
        height = width = 0
        bucket = choose_bucket(settings.buckets, 1, 1, available)
    if bucket is None:
        shortest = min(bucket.num_frames for bucket in settings.buckets)
        raise InputError(
            f"{clip.name}: too short, {length.duration_s:.2f} s or {available} frames at "
            f"{settings.fps:g} a second; the shortest bucket has {shortest}."
        )
    record |= {"bucket": str(bucket), "duration_s": round(length.duration_s, 3)}

    # What training will see and hear of it.
    digest, warnings = hashlib.sha256(), []
    frames = samples = None
    rows = []
    if picture is not None:
        frames = read_pixels(clip, settings, bucket)
        digest.update(frames.tobytes())
        warnings += _picture_warnings(frames, height, width, bucket)
        rows.append(frames)
    for name, reference in read_references(clip, settings, bucket, frames).items():
        digest.update(name.encode() + reference.tobytes())
        rows.append(reference)
    if has_audio:
        samples = read_sound(clip, bucket.num_frames / settings.fps)
        digest.update(samples.samples.tobytes())
        if np.abs(samples.samples).max() < SILENT:
            warnings.append("the sound is silent")
    for column in ("reference_audio", "video_mask", "audio_mask"):
        if column in clip.files:
            digest.update(column.encode() + clip.files[column].read_bytes())
    record |= {"content": digest.hexdigest(), "warnings": warnings}
    sheet = _thumbnail(rows, samples, bucket.num_frames / settings.fps)
    write_whole(thumbnails / thumbnail_name(record), jpeg(sheet))
    return record


def thumbnail_name(record: dict[str, Any]) -> str:
    return f"{record['content'][:20]}.jpg"


def verify(path: Path) -> media.MediaInfo:
    """Decodes every frame of the first tracks. Raises InputError at damage or missing frames.

    Decoders hide damage as well as they can; it shows in the marks that they leave on frames.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        height, width, _ = media.read_image(path).shape
        return media.MediaInfo(path, 0.0, width, height, None, 1, "image", None, None, None, {})
    info = media.probe(path)
    count = 0
    try:
        with av.open(str(path)) as container:
            tracks = [*container.streams.video[:1], *container.streams.audio[:1]]
            for track in tracks:
                track.thread_type = "AUTO"
            for frame in container.decode(*tracks):
                if isinstance(frame, av.VideoFrame):
                    count += 1
                if frame.is_corrupt:
                    raise InputError(f"{path}: damaged near {frame.time or 0:.2f} s.")
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: damaged after {count} frames ({error.strerror}).") from error
    if info.num_frames is not None and count < info.num_frames - HIDDEN_FRAMES:
        raise InputError(f"{path}: cut short, {count} of {info.num_frames} frames can be decoded.")
    return info


# What is read of a clip, for the check and again for its latents.


def read_pixels(clip: Clip, settings: Settings, bucket: Bucket) -> media.Frames:
    """The frames (num_frames, height, width, 3) of uint8 that stand for a clip in its bucket."""
    return _read_fitted(clip, "video", settings, bucket)


def read_references(
    clip: Clip, settings: Settings, bucket: Bucket, frames: media.Frames | None
) -> dict[str, media.Frames]:
    """What an IC-LoRA is shown, by the name of its latents, at the settings' fraction of the size.

    A row's own reference video, or a control made of the frames, is `reference_latents`; of
    several, a control has its own name, such as `reference_canny`.
    """
    full: dict[str, media.Frames] = {}
    if "reference_video" in clip.files:
        full["reference_latents"] = _read_fitted(clip, "reference_video", settings, bucket)
    for control in settings.controls if frames is not None else ():
        is_only = len(settings.controls) == 1 and not full
        name = "reference_latents" if is_only else f"reference_{control}"
        full[name] = make_control(control, frames)
    downscale, every = settings.reference_downscale_factor, settings.reference_temporal_scale_factor
    height, width = bucket.height // downscale, bucket.width // downscale
    return {
        name: np.stack(
            [
                media.prepare_frame(reference[index], height, width)
                for index in [0, *range(1, len(reference), every)]
            ]
        )
        for name, reference in full.items()
    }


def read_sound(clip: Clip, duration_s: float) -> media.Audio:
    """The first `duration_s` of a clip's sound: its own file's, else the video's."""
    return media.read_span(clip.files.get("audio") or clip.files["video"], 0.0, duration_s)


def read_mask(clip: Clip, settings: Settings, bucket: Bucket) -> np.ndarray:
    """A video mask as booleans (num_frames, height, width): white is given. One image is all."""
    frames = _read_fitted(clip, "video_mask", settings, bucket, is_repeated=True)
    return frames.mean(-1) > 127


def _read_fitted(
    clip: Clip, column: str, settings: Settings, bucket: Bucket, *, is_repeated: bool = False
) -> media.Frames:
    path = clip.files[column]
    # A clip's picture, reference and mask are cut alike: the place is its name's.
    place = _place(clip.name) if settings.reshape_mode == "random" else (0.5, 0.5)
    frames = [
        media.prepare_frame(frame, bucket.height, bucket.width, place=place)
        for frame in media.read_frames_at(path, settings.fps, bucket.num_frames)
    ]
    if is_repeated and len(frames) == 1:
        frames *= bucket.num_frames
    if len(frames) < bucket.num_frames:
        raise InputError(
            f"{path}: too short, {len(frames)} frames at {settings.fps:g} a second; its bucket "
            f"{bucket} needs {bucket.num_frames}."
        )
    return np.stack(frames)


def _place(name: str) -> tuple[float, float]:
    down, right = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint32) / 2**32
    return float(down), float(right)


# Parts.


def _frames_at(info: media.MediaInfo, fps: float) -> int:
    if info.num_frames == 1:
        return 1
    if info.num_frames is not None and info.fps:
        return math.floor(info.num_frames / info.fps * fps + 0.01)
    return math.floor(info.duration_s * fps + 0.01)


def _upright_size(path: Path) -> tuple[int, int]:
    frame = next(iter(media.read_frames_at(path, 1.0, 1)))
    return frame.shape[0], frame.shape[1]


def _picture_warnings(frames: media.Frames, height: int, width: int, bucket: Bucket) -> list[str]:
    warnings = []
    scale = max(bucket.height / height, bucket.width / width)
    if scale > ENLARGED:
        warnings.append(f"enlarged {scale:.1f} times")
    lost = 1 - bucket.height * bucket.width / (height * width * scale**2)
    if lost > CROPPED:
        warnings.append(f"{lost:.0%} of the picture is cropped away")
    if len(frames) > 1:
        steps = np.abs(frames[1:, ::4, ::4].astype(np.int16) - frames[:-1, ::4, ::4])
        if steps.mean(axis=(1, 2, 3)).max() < STILL:
            warnings.append("nothing moves")
    return warnings


def _thumbnail(
    rows: list[media.Frames], audio: media.Audio | None, duration_s: float
) -> np.ndarray:
    """Some frames of the clip with its sound below, then of its references."""
    sheets = []
    for number, frames in enumerate(rows):
        count = min(THUMBNAIL_FRAMES, len(frames))
        chosen = frames[np.linspace(0, len(frames) - 1, count).astype(int)]
        width = max(1, round(THUMBNAIL_HEIGHT * frames.shape[2] / frames.shape[1]))
        small = np.stack(
            [np.asarray(Image.fromarray(f).resize((width, THUMBNAIL_HEIGHT))) for f in chosen]
        )
        if number == 0 and audio is not None:
            sheets.append(
                contact_sheet(
                    small,
                    audio.samples,
                    sample_rate=audio.sample_rate,
                    fps=len(small) / duration_s,
                    width=width * len(small),
                )
            )
        else:
            sheets.append(np.concatenate(small, axis=1))
    if not sheets and audio is not None:
        black = np.zeros((1, 1, 4 * THUMBNAIL_HEIGHT, 3), np.uint8)
        sheets.append(
            contact_sheet(
                black,
                audio.samples,
                sample_rate=audio.sample_rate,
                fps=1 / duration_s,
                width=4 * THUMBNAIL_HEIGHT,
            )
        )
    widest = max(sheet.shape[1] for sheet in sheets)
    padded = [np.pad(s, ((0, 0), (0, widest - s.shape[1]), (0, 0))) for s in sheets]
    return np.concatenate(padded)


def jpeg(image: np.ndarray) -> bytes:
    """An image (height, width, 3) of uint8 as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=85)
    return stream.getvalue()


def clip_key(clip: Clip) -> str:
    """What a check of a clip depends on: its name and its files' sizes and times of change."""
    files = {}
    for column, path in clip.files.items():
        try:
            found = path.stat()
        except OSError:
            files[column] = None
        else:
            files[column] = [found.st_size, found.st_mtime_ns]
    text = json.dumps([clip.name, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
