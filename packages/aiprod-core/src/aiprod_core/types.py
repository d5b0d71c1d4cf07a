"""The nouns everyone shares: shapes in pixels and latents, and what flows through the model.

Letters: B batch, C channels, F latent frames, H W latent height and width, N tokens, S text tokens,
D model width, T audio latent frames.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from aiprod_core.errors import InputError


class ScaleFactors(NamedTuple):
    """How many pixels (frames, rows, columns) one video latent covers; (8, 32, 32) in LTX-2."""

    time: int
    height: int
    width: int


class VideoLatentShape(NamedTuple):
    batch: int
    channels: int
    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


class AudioLatentShape(NamedTuple):
    batch: int
    channels: int
    frames: int
    mel_bins: int


class VideoShape(NamedTuple):
    """A clip in pixels. `fps` is frames per second of playback."""

    batch: int
    num_frames: int
    height: int
    width: int
    fps: float

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    def latent(self, channels: int, scale: ScaleFactors) -> VideoLatentShape:
        """The latent grid. Raises InputError off the grid, naming the nearest valid value."""
        if self.num_frames < 1 or (self.num_frames - 1) % scale.time:
            nearest = max(0, round((self.num_frames - 1) / scale.time)) * scale.time + 1
            raise InputError(
                f"num_frames must be {scale.time}k+1; got {self.num_frames}, try {nearest}"
            )
        for name, size, factor in (
            ("height", self.height, scale.height),
            ("width", self.width, scale.width),
        ):
            if size < factor or size % factor:
                nearest = max(1, round(size / factor)) * factor
                raise InputError(
                    f"{name} must be a multiple of {factor}; got {size}, try {nearest}"
                )
        return VideoLatentShape(
            self.batch,
            channels,
            (self.num_frames - 1) // scale.time + 1,
            self.height // scale.height,
            self.width // scale.width,
        )

    def audio_latent(
        self, channels: int, mel_bins: int, latents_per_second: float
    ) -> AudioLatentShape:
        """The sound that goes with the clip: `round(duration x latents per second)` frames."""
        frames = round(self.num_frames / self.fps * latents_per_second)
        return AudioLatentShape(self.batch, channels, frames, mel_bins)


@dataclass(frozen=True)
class AV:
    """The tokens of both modalities, (B, N, C) each, that a sampler moves as one state.

    Arithmetic works per modality, with numbers or with another AV; an absent modality is None and
    stays None. So a sampler reads as if it moved a single tensor.
    """

    video: Tensor | None = None
    audio: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: "AV") -> "AV":
        """`function(own, *others)` per modality that is present."""

        def of(name: str) -> Tensor | None:
            own = getattr(self, name)
            return None if own is None else function(own, *(getattr(o, name) for o in others))

        return AV(of("video"), of("audio"))

    def __add__(self, other: "AV") -> "AV":
        return self.map(lambda a, b: a + b, other)

    def __sub__(self, other: "AV") -> "AV":
        return self.map(lambda a, b: a - b, other)

    def __mul__(self, scale: float) -> "AV":
        return self.map(lambda a: a * scale)

    def __truediv__(self, scale: float) -> "AV":
        return self.map(lambda a: a / scale)

    __rmul__ = __mul__


@dataclass(frozen=True)
class LatentState:
    """One modality's tokens on their way from noise to clean, with their conditions.

    latent, clean_latent (B, N, C); denoise_mask (B, N, 1), 1 = generate, 0 = keep `clean_latent`;
    positions (B, axes, N, 2) as [start, end): seconds, and pixels for height and width;
    attention_mask (B, N, N) self-attention weights in [0, 1] or None for full attention;
    keyframe_marker (B, N, 1), 1 on tokens that stand for a single frame, or None.
    """

    latent: Tensor
    clean_latent: Tensor
    denoise_mask: Tensor
    positions: Tensor
    attention_mask: Tensor | None = None
    keyframe_marker: Tensor | None = None


@dataclass(frozen=True)
class Modality:
    """What the transformer is given for one modality.

    latent (B, N, C) noisy tokens; sigma (B,) noise level in [0, 1]; timesteps (B, N, 1), the noise
    level of each token (`denoise_mask * sigma`); positions (B, axes, N, 2); context (B, S, D);
    context_mask (B, S) 1 = attend, or None; attention_mask (B, N, N) or broadcastable (1, 1, N),
    weights in [0, 1], or None; keyframe_marker (B, N, 1) or None. With `enabled` False the stream
    is read by the other modality but not updated.
    """

    latent: Tensor
    sigma: Tensor
    timesteps: Tensor
    positions: Tensor
    context: Tensor
    context_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    keyframe_marker: Tensor | None = None
    enabled: bool = True
