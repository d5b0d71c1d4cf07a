"""What a user asks for: one frozen value, the same for Python, the command line and HTTP.

A request is checked twice, both times before any weight is read. On construction: types and ranges,
whatever the model. In `resolved(profile)`: the fields left as None take the model's defaults, sizes
must lie on the model's grid, images must be readable. Every refusal is an InputError that names the
nearest valid value.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aiprod_core.components.samplers import SAMPLERS
from aiprod_core.components.schedulers import SCHEDULES, STAGE_2, distilled
from aiprod_core.components.step_cache import POLICIES
from aiprod_core.components.windows import Window, split_into_windows
from aiprod_core.errors import InputError
from aiprod_core.types import ScaleFactors, VideoShape
from aiprod_pipelines import media

MAX_SEED = 2**63 - 1

# The fixed levels of distilled models besides the schedules that take any number of steps.
SCHEDULE_NAMES = (*SCHEDULES, "distilled")
STEP_CACHES = ("off", *POLICIES)
MODALITIES = ("video", "audio", "both")
PER_MODALITY = (
    "cfg_scale", "stg_scale", "rescale_scale", "modality_scale", "nag_scale", "skip_step",
)  # fmt: skip
MADE_CONTROLS = ("canny", "depth", "pose")  # signals that are made from ordinary footage
CONTROL_KINDS = (
    *MADE_CONTROLS,
    *(f"{kind}-made" for kind in MADE_CONTROLS),  # the same signals, ready-made
    "detailer",
    "reference",
)
DECODERS = ("full", "tiny")
CAMERAS = ("dolly-in", "dolly-out", "dolly-left", "dolly-right", "jib-up", "jib-down", "static")

# Ours; used when the model does not bring its own. It names defects, never subjects.
DEFAULT_NEGATIVE_PROMPT = (
    "blurry, low resolution, compression artefacts, overexposed, washed-out colours, flicker, "
    "jitter, frozen picture, ghosting, warped anatomy, extra limbs, deformed hands, melting faces, "
    "inconsistent motion, morphing objects, watermark, logo, burned-in subtitles, text overlay, "
    "muffled sound, hiss, clipping, robotic voice, garbled speech, sound out of sync, "
    "unrelated music"
)


class PerModality(NamedTuple):
    """One number for the picture and one for the sound."""

    video: float
    audio: float

    @classmethod
    def parse(cls, text: str, name: str, default: "PerModality | None" = None) -> "PerModality":
        """Reads "3" (both), "video=3,audio=7", or one of the two; the other keeps its default."""
        try:
            if "=" not in text:
                return cls(float(text), float(text))
            parts = dict(part.strip().split("=", 1) for part in text.split(","))
            values = {key.strip(): float(value) for key, value in parts.items()}
            if not values.keys() <= {"video", "audio"}:
                raise ValueError
            merged = (default._asdict() if default else {}) | values
            return cls(**merged)
        except (ValueError, TypeError):
            raise InputError(
                f"{name} is one number or video=NUMBER,audio=NUMBER; got {text!r}, try "
                '"3" or "video=3,audio=7".'
            ) from None


@dataclass(frozen=True)
class ImageCondition:
    """An image that the clip shows at pixel frame `frame`; `strength` 1 keeps it exactly."""

    path: Path
    frame: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        _check_number("image frame", self.frame, 0, math.inf, integer=True)
        _check_number("image strength", self.strength, 0.0, 1.0)

    @classmethod
    def parse(cls, text: str) -> "ImageCondition":
        """Reads PATH[:FRAME[:STRENGTH]]. A path may itself hold colons."""
        path, numbers = _split_numbers(text, at_most=2)
        if numbers and numbers[0] != int(numbers[0]):
            raise InputError(f"--image {text}: the frame is a whole number; got {numbers[0]}.")
        frame = int(numbers[0]) if numbers else 0
        return cls(path, frame, *numbers[1:])


@dataclass(frozen=True)
class ControlCondition:
    """A video or an image that an IC-LoRA follows.

    canny, depth and pose are made from the file; canny-made, depth-made and pose-made say that it
    already is one. detailer and reference show the file as it is.
    """

    kind: str
    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        _check_choice("control", self.kind, CONTROL_KINDS)
        _check_number("control strength", self.strength, 0.0, 1.0)

    @classmethod
    def parse(cls, text: str) -> "ControlCondition":
        """Reads KIND=PATH[:STRENGTH]."""
        kind, equals, rest = text.partition("=")
        if not equals or not rest:
            raise InputError(f"--control {text}: give KIND=PATH, such as canny=dance.mp4.")
        path, numbers = _split_numbers(rest, at_most=1)
        return cls(kind, path, *numbers)


@dataclass(frozen=True)
class LoraFile:
    """An adapter file and how strongly it is added to the weights; 0 leaves it out."""

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        _check_number("LoRA strength", self.strength, -100.0, 100.0)

    @classmethod
    def parse(cls, text: str) -> "LoraFile":
        """Reads PATH[:STRENGTH]."""
        path, numbers = _split_numbers(text, at_most=1)
        return cls(path, *numbers)


F = TypeVar("F", ImageCondition, ControlCondition, LoraFile)


@dataclass(frozen=True)
class ModelProfile:
    """What a request must know of a model: its grid and its defaults, read from the header."""

    scale: ScaleFactors
    height: int = 512
    width: int = 768
    num_frames: int = 121
    frame_rate: float = 24.0
    num_inference_steps: int = 30
    cfg_scale: PerModality = field(default=PerModality(3.0, 7.0))
    stg_scale: PerModality = field(default=PerModality(1.0, 1.0))
    rescale_scale: PerModality = field(default=PerModality(0.7, 0.7))
    modality_scale: PerModality = field(default=PerModality(3.0, 3.0))
    stg_blocks: tuple[int, ...] = (28,)
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    sampler: str = "euler"
    schedule: str = "shifted"
    stage_2_sigmas: tuple[float, ...] = STAGE_2[:-1]
    image_crf: int = 33
    num_layers: int = 48
    has_audio: bool = True

    def replaced(self, values: Mapping[str, Any]) -> "ModelProfile":
        """With the defaults that a checkpoint carries in its own `generation` metadata."""
        known = {f.name for f in dataclasses.fields(self)} - {"scale", "num_layers", "has_audio"}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise InputError(
                f'the checkpoint\'s "generation" metadata has unknown keys {", ".join(unknown)}; '
                f"known are {', '.join(sorted(known))}."
            )
        return dataclasses.replace(self, **{k: _from_plain(k, v) for k, v in values.items()})


@dataclass(frozen=True)
class GenerationRequest:
    """Everything that decides a clip. None means the model's default; see `resolved`."""

    prompt: str
    negative_prompt: str | None = None
    seed: int = 10
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_frames: int | None = None
    frame_rate: float | None = None  # frames per second of playback
    num_inference_steps: int | None = None
    cfg_scale: PerModality | None = None  # 1 = no guidance by the negative prompt
    stg_scale: PerModality | None = None  # 0 = no spatio-temporal guidance
    rescale_scale: PerModality | None = None  # 0 = no rescaling of the guided estimate
    modality_scale: PerModality | None = None  # 1 = no guidance by the isolated modality
    stg_blocks: tuple[int, ...] | None = None
    skip_step: PerModality = field(default=PerModality(0, 0))  # k: guide every (k+1)-th step only
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # sigmas outside are not guided
    # Guidance passes are left out once they point as the prompt's own: the cosine; 1 = never.
    adaptive_guidance: float = 1.0
    step_cache: str = "off"  # one of STEP_CACHES: steps that are forecast instead of computed
    # Negative prompts for models that run without cfg_scale; 1 = off.
    nag_scale: PerModality = field(default=PerModality(1.0, 1.0))
    nag_tau: float = 2.5
    nag_alpha: float = 0.25
    sampler: str | None = None  # one of SAMPLERS
    schedule: str | None = None  # one of SCHEDULE_NAMES
    stage_2_sigmas: tuple[float, ...] | None = None  # noise levels of a second stage, before 0
    max_batch_size: int | None = None  # guidance passes a model call; None = all
    images: tuple[ImageCondition, ...] = field(default=())
    keyframes: tuple[ImageCondition, ...] = field(default=())
    image_crf: int | None = None  # H.264 round trip of images; 0 = none
    controls: tuple[ControlCondition, ...] = field(default=())
    source: Path | None = None  # the clip to edit
    start_time: float | None = None  # seconds in it
    end_time: float | None = None
    modality: str = "both"  # what a retake makes anew: video, audio or both
    audio: Path | None = None  # a sound that the picture follows and the clip keeps
    audio_start_time: float = 0.0  # seconds of it that are skipped
    audio_prompt: str | None = None  # how it sounds; joined to the prompt
    generate_audio: bool = True
    loras: tuple[LoraFile, ...] = field(default=())
    camera: str | None = None  # one of CAMERAS; its LoRA, found beside the model, joins `loras`
    spatial_upsampler: Path | None = None  # None = found beside the model
    distilled_lora: LoraFile | None = None  # None = found beside the model
    refine_tile: str = "auto"  # what a second stage sees at once: auto, off or WIDTHxHEIGHT
    window_frames: int | None = None  # what the model sees of a long clip at once; None = all
    window_overlap: int | None = None  # frames; None = a quarter of the window
    skip_stage_2: bool = False  # first stage only, at full size
    best_of: int = 1  # seeds from `seed` on of which the best is finished (best_of.py)
    heal: int = 0  # retakes at most that mend the clip's defects (heal.py); 0 = it is not judged
    enlarge: int = 1  # integer factor for viewing, applied when the file is written
    enlarge_method: str = "bicubic"
    crf: int = 19  # quality of the written H.264; lower is better
    original_prompt: str | None = None  # what the prompt was made from, if it was enhanced
    enhanced_by: str | None = None  # who wrote it
    tile: str = "auto"  # how the picture is decoded: auto, off or WIDTHxHEIGHTxFRAMES
    decoder: str = "full"  # of the picture: full, or the tiny one beside the model, for previews

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise InputError("the prompt is empty; describe the clip in a sentence.")
        _check_number("seed", self.seed, 0, MAX_SEED, integer=True)
        _check_number("enlarge", self.enlarge, 1, 64, integer=True)
        _check_number("best_of", self.best_of, 1, 64, integer=True)
        _check_number("crf", self.crf, 0, 51, integer=True)
        if not re.fullmatch(r"auto|off|[1-9]\d*x[1-9]\d*x[1-9]\d*", self.tile):
            raise InputError(
                f'tile must be auto, off or WIDTHxHEIGHTxFRAMES; got "{self.tile}", try 768x768x80.'
            )
        if not re.fullmatch(r"auto|off|[1-9]\d*x[1-9]\d*", self.refine_tile):
            raise InputError(
                f'refine_tile must be auto, off or WIDTHxHEIGHT; got "{self.refine_tile}", try '
                "768x768."
            )
        if self.window_overlap is not None and self.window_frames is None:
            raise InputError("window_overlap goes with window_frames; give both.")
        if self.enlarge_method not in media.RESAMPLING:
            raise InputError(
                f"enlarge_method must be one of {', '.join(media.RESAMPLING)}; "
                f"got {self.enlarge_method}."
            )
        for name, low, high, integer in (
            ("height", 1, math.inf, True),
            ("width", 1, math.inf, True),
            ("num_frames", 1, math.inf, True),
            ("num_inference_steps", 1, 10_000, True),
            ("frame_rate", 0.1, 1000.0, False),
            ("image_crf", 0, 51, True),
            ("max_batch_size", 1, 1000, True),
            ("start_time", 0.0, math.inf, False),
            ("end_time", 0.0, math.inf, False),
            ("audio_start_time", 0.0, math.inf, False),
            ("adaptive_guidance", 0.0, 1.0, False),
            ("nag_tau", 0.0, 1000.0, False),
            ("nag_alpha", 0.0, 1.0, False),
            ("window_frames", 1, math.inf, True),
            ("window_overlap", 1, math.inf, True),
            ("heal", 0, 100, True),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, low, high, integer=integer)
        for name, choices in (
            ("sampler", tuple(SAMPLERS)),
            ("schedule", SCHEDULE_NAMES),
            ("modality", MODALITIES),
            ("camera", CAMERAS),
            ("step_cache", STEP_CACHES),
            ("decoder", DECODERS),
        ):
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), choices)
        low, high = _as_interval(self.guidance_interval)
        object.__setattr__(self, "guidance_interval", (low, high))
        for name in PER_MODALITY:
            value = getattr(self, name)
            if value is None:
                continue
            pair = PerModality(value, value) if isinstance(value, int | float) else value
            pair = PerModality(*pair)
            high = 1.0 if name == "rescale_scale" else 1000.0
            for modality, number in pair._asdict().items():
                _check_number(f"{name} of {modality}", number, 0.0, high)
            object.__setattr__(self, name, pair)
        if self.stg_blocks is not None:
            object.__setattr__(self, "stg_blocks", tuple(self.stg_blocks))
        if self.stage_2_sigmas is not None:
            object.__setattr__(self, "stage_2_sigmas", _as_levels(self.stage_2_sigmas))
        for name, kind in LISTED_FILES.items():
            files = tuple(_as_file(kind, name, value) for value in getattr(self, name))
            object.__setattr__(self, name, files)
        if self.distilled_lora is not None:
            lora = _as_file(LoraFile, "distilled_lora", self.distilled_lora)
            object.__setattr__(self, "distilled_lora", lora)
        for name in ("source", "audio", "spatial_upsampler"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if self.audio is not None and not self.generate_audio:
            raise InputError("a sound to follow and a silent clip exclude each other; give one.")

    def resolved(self, profile: ModelProfile) -> "GenerationRequest":
        """Fills every None from the model and checks the request against it.

        Raises InputError for a size off the grid, an image outside the clip or unreadable, a block
        that the model does not have.
        """
        known = {f.name for f in dataclasses.fields(profile)}
        defaults = {
            f.name: getattr(profile, f.name)
            for f in dataclasses.fields(self)
            if f.name in known and getattr(self, f.name) is None
        }
        full = dataclasses.replace(self, **defaults)
        if not profile.has_audio:
            if full.audio is not None:
                raise InputError(f"{full.audio}: this model has no sound, so it cannot follow one.")
            full = dataclasses.replace(full, generate_audio=False)
        full.shape.latent(channels=1, scale=profile.scale)
        time = profile.scale.time
        if full.window_frames is not None:
            overlap = full.window_overlap or max(1, full.window_frames // 4 // time) * time
            full = dataclasses.replace(full, window_overlap=overlap)
        full.windows(time)
        if full.nag_scale != (1, 1) and full.cfg_scale != (1, 1):
            raise InputError(
                "nag_scale is for models that run without cfg_scale; give one, or cfg_scale 1."
            )
        for block in full.stg_blocks or ():
            _check_number("stg_blocks", block, 0, profile.num_layers - 1, integer=True)
        if full.schedule == "distilled":
            distilled(full.num_inference_steps or 1)  # refuses a number of steps that it lacks
        full._check_files()
        return full

    def _check_files(self) -> None:
        """Images are read whole; of videos and sounds only the headers, whatever their length."""
        last = self.shape.num_frames - 1
        shown = [*self.images, *self.keyframes]
        for image in shown:
            if image.frame > last:
                raise InputError(
                    f"{image.path}: frame {image.frame} is outside the clip of "
                    f"{self.num_frames} frames; the last is {last}."
                )
            media.read_image(image.path)
        frames = [image.frame for image in shown]
        repeated = next((frame for frame in frames if frames.count(frame) > 1), None)
        if repeated is not None:
            raise InputError(f"two images are given for frame {repeated}; keep one.")
        for path in (self.source, *(control.path for control in self.controls)):
            if path is not None and media.probe(path).width is None:
                raise InputError(f"{path}: no picture in this file.")
        if self.audio is not None:
            info = media.probe(self.audio)
            if info.audio_codec is None:
                raise InputError(f"{self.audio}: no sound track in this file.")
            if self.audio_start_time >= info.duration_s:
                raise InputError(
                    f"audio_start_time {self.audio_start_time:g} s is after the end of "
                    f"{self.audio}, which lasts {info.duration_s:.2f} s; try 0."
                )

    @property
    def text(self) -> str:
        """What the text encoder reads: the prompt and, after it, how the clip sounds."""
        return " ".join(part.strip() for part in (self.prompt, self.audio_prompt or "")).strip()

    @property
    def input_files(self) -> list[Path]:
        """Every file besides the model that decides the clip, each once."""
        files = [
            *(image.path for image in (*self.images, *self.keyframes)),
            *(control.path for control in self.controls),
            *(lora.path for lora in self.loras),
            *([self.distilled_lora.path] if self.distilled_lora else []),
            *(path for path in (self.source, self.audio, self.spatial_upsampler) if path),
        ]
        return list(dict.fromkeys(files))

    def at_half_size(self) -> "GenerationRequest":
        """The first stage's picture; for a resolved request."""
        shape = self.shape
        return dataclasses.replace(self, height=shape.height // 2, width=shape.width // 2)

    @property
    def shape(self) -> VideoShape:
        """The clip's shape in pixels, one sample; only for a resolved request."""
        if None in (self.num_frames, self.height, self.width, self.frame_rate):
            raise ValueError("the request must be resolved against a model first")
        return VideoShape(1, self.num_frames, self.height, self.width, self.frame_rate)  # pyright: ignore[reportArgumentType]

    def windows(self, time_scale: int) -> list[Window]:
        """The stretches of a resolved request's clip that the model sees one after another."""
        return split_into_windows(
            self.shape.num_frames,
            self.shape.fps,
            size=self.window_frames or self.shape.num_frames,
            overlap=self.window_overlap or time_scale,
            time_scale=time_scale,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for recipes and HTTP; `from_dict` is the inverse."""
        return {f.name: _to_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationRequest":
        """Builds a request from plain values. Raises InputError on unknown fields."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise InputError(
                f"unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}."
            )
        if "prompt" not in values:
            raise InputError("the request has no prompt.")
        return cls(**{name: _from_plain(name, value) for name, value in values.items()})


LISTED_FILES = {
    "images": ImageCondition,
    "keyframes": ImageCondition,
    "controls": ControlCondition,
    "loras": LoraFile,
}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, PerModality):
        return value._asdict()
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _from_plain(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in PER_MODALITY:
        if isinstance(value, Mapping):
            return PerModality(**value)
        if isinstance(value, int | float):
            return PerModality(value, value)
    if name == "stage_2_sigmas":
        return _as_levels(value)
    if name in LISTED_FILES or name in ("stg_blocks", "guidance_interval"):
        if not isinstance(value, tuple | list):
            raise InputError(f"{name} is a list; got {value!r}.")
        return tuple(value)
    return value


def _as_file(kind: type[F], name: str, value: Any) -> F:
    """A file with its numbers, from itself, a path, a list or an object of plain values."""
    if isinstance(value, kind):
        return value
    try:
        if isinstance(value, Mapping):
            return kind(**value)
        values: list[Any] = list(value) if isinstance(value, tuple | list) else [Path(value)]
        return kind(*values)
    except TypeError:
        pass
    names = ", ".join(f.name for f in dataclasses.fields(kind))
    raise InputError(f"one of {name} is an object or a list of {names}; got {value!r}.")


def _as_interval(value: Any) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in value)
    except (TypeError, ValueError):
        raise InputError(f"guidance_interval is two sigmas; got {value!r}, try (0, 1).") from None
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"guidance_interval must rise within 0 and 1; got {low:g} to {high:g}, try 0 to 1."
        )
    return low, high


def _as_levels(value: Any) -> tuple[float, ...]:
    try:
        levels = tuple(float(number) for number in value)
    except (TypeError, ValueError):
        raise InputError(
            f"stage_2_sigmas is a list of sigmas; got {value!r}, try {list(STAGE_2[:-1])}."
        ) from None
    is_falling = all(high > low for high, low in pairwise((*levels, 0.0)))
    if not levels or levels[0] > 1 or not is_falling:
        raise InputError(
            f"stage_2_sigmas must fall from at most 1 and stay above 0; got {list(levels)}, try "
            f"{list(STAGE_2[:-1])}."
        )
    return levels


def _split_numbers(text: str, at_most: int) -> tuple[Path, list[float]]:
    """PATH[:NUMBER...]; a path may itself hold colons, so an existing file ends the search."""
    path, numbers = text, []
    while len(numbers) < at_most and not Path(path).exists():
        head, colon, tail = path.rpartition(":")
        if not colon or not _is_number(tail):
            break
        path, numbers = head, [float(tail), *numbers]
    return Path(path), numbers


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, 1, cutoff=0.4)
    hint = f", try {near[0]}" if near else ""
    raise InputError(f"{name} must be one of {', '.join(choices)}; got {value}{hint}.")


def _check_number(name: str, value: Any, low: float, high: float, *, integer: bool = False) -> None:
    kind = "a whole number" if integer else "a number"
    is_number = isinstance(value, int) or (isinstance(value, float) and not integer)
    if isinstance(value, bool) or not is_number or not (integer or math.isfinite(value)):
        raise InputError(f"{name} must be {kind}; got {value!r}.")
    if not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        nearest = low if value < low else high
        raise InputError(f"{name} must be {bounds}; got {value}, try {nearest}.")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
