"""What a user asks for: one frozen value, the same for Python, the command line and HTTP.

A request is checked twice, both times before any weight is read. On construction: types and ranges,
whatever the model. In `resolved(profile)`: the fields left as None take the model's defaults, sizes
must lie on the model's grid, images must be readable. Every refusal is an InputError that names the
nearest valid value.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aiprod_core.errors import InputError
from aiprod_core.types import ScaleFactors, VideoShape
from aiprod_pipelines import media

MAX_SEED = 2**63 - 1

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
        path, numbers = text, []
        while len(numbers) < 2 and not Path(path).exists():
            head, colon, tail = path.rpartition(":")
            if not colon or not _is_number(tail):
                break
            path, numbers = head, [float(tail), *numbers]
        if numbers and numbers[0] != int(numbers[0]):
            raise InputError(f"--image {text}: the frame is a whole number; got {numbers[0]}.")
        frame = int(numbers[0]) if numbers else 0
        return cls(Path(path), frame, *numbers[1:])


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
    images: tuple[ImageCondition, ...] = field(default=())
    image_crf: int | None = None  # H.264 round trip of images; 0 = none
    generate_audio: bool = True
    enlarge: int = 1  # integer factor for viewing, applied when the file is written
    enlarge_method: str = "bicubic"
    crf: int = 19  # quality of the written H.264; lower is better

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise InputError("the prompt is empty; describe the clip in a sentence.")
        _check_number("seed", self.seed, 0, MAX_SEED, integer=True)
        _check_number("enlarge", self.enlarge, 1, 64, integer=True)
        _check_number("crf", self.crf, 0, 51, integer=True)
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
        ):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, low, high, integer=integer)
        for name in ("cfg_scale", "stg_scale", "rescale_scale", "modality_scale"):
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
        images = tuple(_as_image_condition(image) for image in self.images)
        object.__setattr__(self, "images", images)

    def resolved(self, profile: ModelProfile) -> "GenerationRequest":
        """Fills every None from the model and checks the request against it.

        Raises InputError for a size off the grid, an image outside the clip or unreadable, a block
        that the model does not have.
        """
        defaults = {
            f.name: getattr(profile, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) is None
        }
        full = dataclasses.replace(self, **defaults)
        if full.generate_audio and not profile.has_audio:
            full = dataclasses.replace(full, generate_audio=False)
        full.shape.latent(channels=1, scale=profile.scale)
        for block in full.stg_blocks or ():
            _check_number("stg_blocks", block, 0, profile.num_layers - 1, integer=True)
        for image in full.images:
            last = full.shape.num_frames - 1
            if image.frame > last:
                raise InputError(
                    f"{image.path}: frame {image.frame} is outside the clip of "
                    f"{full.num_frames} frames; the last is {last}."
                )
            media.read_image(image.path)
        frames = [image.frame for image in full.images]
        repeated = next((frame for frame in frames if frames.count(frame) > 1), None)
        if repeated is not None:
            raise InputError(f"two images are given for frame {repeated}; keep one.")
        return full

    @property
    def shape(self) -> VideoShape:
        """The clip's shape in pixels, one sample; only for a resolved request."""
        if None in (self.num_frames, self.height, self.width, self.frame_rate):
            raise ValueError("the request must be resolved against a model first")
        return VideoShape(1, self.num_frames, self.height, self.width, self.frame_rate)  # pyright: ignore[reportArgumentType]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for recipes and HTTP; `from_dict` is the inverse."""
        plain = dataclasses.asdict(self)
        for name, value in plain.items():
            if isinstance(value, PerModality):
                plain[name] = value._asdict()
        plain["images"] = [
            {"path": str(image.path), "frame": image.frame, "strength": image.strength}
            for image in self.images
        ]
        plain["stg_blocks"] = list(self.stg_blocks) if self.stg_blocks is not None else None
        return plain

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


def _from_plain(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name.endswith("_scale") and isinstance(value, Mapping):
        return PerModality(**value)
    if name.endswith("_scale") and isinstance(value, int | float):
        return PerModality(value, value)
    if name == "stg_blocks":
        return tuple(value)
    if name == "images":
        return tuple(_as_image_condition(image) for image in value)
    return value


def _as_image_condition(image: Any) -> ImageCondition:
    if isinstance(image, ImageCondition):
        return image
    try:
        if isinstance(image, Mapping):
            return ImageCondition(**image)
        if isinstance(image, tuple | list):
            return ImageCondition(*image)
        return ImageCondition(Path(image))
    except TypeError:
        raise InputError(
            f"an image is a path, or (path, frame, strength), or an object with those fields; "
            f"got {image!r}."
        ) from None


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
