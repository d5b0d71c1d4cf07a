"""Latents to tokens and back, and where each token lies in time and space.

Positions are [start, end) intervals: seconds for time, pixels for height and width. A causal codec
sees a single frame first, so its first latent covers one frame and the others a whole step each.

Letters: B batch, C channels, F latent frames, H W latent height and width, T audio latent frames,
p patch size (1 in all published models), N tokens.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from aiprod_core.types import AudioLatentShape, ScaleFactors, VideoLatentShape


@dataclass(frozen=True)
class VideoGrid:
    """A clip's latent grid: how many tokens, and how much time and space each covers."""

    shape: VideoLatentShape
    scale: ScaleFactors
    fps: float
    patch_size: int = 1

    @property
    def num_tokens(self) -> int:
        return self.shape.num_tokens // self.patch_size**2

    @property
    def tokens_per_frame(self) -> int:
        return self.num_tokens // self.shape.frames

    def positions(self, *, is_causal: bool = True) -> Tensor:
        """(B, 3, N, 2) float32: seconds, rows and columns in pixels."""
        pixels = pixel_intervals(
            latent_intervals(self.shape, self.patch_size), self.scale, is_causal=is_causal
        )
        return to_seconds(pixels.float(), self.fps)

    def patchify(self, latent: Tensor) -> Tensor:
        return patchify_video(latent, self.patch_size)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """The clip's latent (B, C, F, H, W); tokens appended after the clip's own are left out."""
        return unpatchify_video(tokens[:, : self.num_tokens], self.shape, self.patch_size)


@dataclass(frozen=True)
class AudioGrid:
    """A sound's latent grid; `hop_length x downsample` samples at `sample_rate` Hz per token."""

    shape: AudioLatentShape
    sample_rate: int = 16000
    hop_length: int = 160
    downsample: int = 4

    @property
    def num_tokens(self) -> int:
        return self.shape.frames

    @property
    def seconds_per_token(self) -> float:
        return self.hop_length * self.downsample / self.sample_rate

    def positions(self) -> Tensor:
        """(B, 1, T, 2) float32 seconds."""
        times = audio_times(
            self.shape.frames,
            sample_rate=self.sample_rate,
            hop_length=self.hop_length,
            downsample=self.downsample,
        )
        return times.expand(self.shape.batch, 1, -1, -1)

    def patchify(self, latent: Tensor) -> Tensor:
        return patchify_audio(latent)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """The sound's latent (B, C, T, bins); tokens appended after its own are left out."""
        return unpatchify_audio(tokens[:, : self.num_tokens], self.shape.mel_bins)


def patchify_video(latent: Tensor, patch_size: int = 1) -> Tensor:
    """(B, C, F, H, W) to (B, N, C p p): frame, row, column order; channel slowest in a token."""
    return rearrange(latent, "b c f (h p) (w q) -> b (f h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify_video(tokens: Tensor, shape: VideoLatentShape, patch_size: int = 1) -> Tensor:
    """The inverse of `patchify_video`; `shape` names the latent's frames, height and width."""
    return rearrange(
        tokens,
        "b (f h w) (c p q) -> b c f (h p) (w q)",
        f=shape.frames,
        h=shape.height // patch_size,
        w=shape.width // patch_size,
        p=patch_size,
        q=patch_size,
    )


def patchify_audio(latent: Tensor) -> Tensor:
    """(B, C, T, bins) to (B, T, C bins): a token is one moment, channel slowest."""
    return rearrange(latent, "b c t m -> b t (c m)")


def unpatchify_audio(tokens: Tensor, mel_bins: int) -> Tensor:
    return rearrange(tokens, "b t (c m) -> b c t m", m=mel_bins)


def latent_intervals(shape: VideoLatentShape, patch_size: int = 1) -> Tensor:
    """(B, 3, N, 2) int64: each token's frames, rows and columns on the latent grid."""
    starts = torch.meshgrid(
        torch.arange(shape.frames),
        torch.arange(0, shape.height, patch_size),
        torch.arange(0, shape.width, patch_size),
        indexing="ij",
    )
    start = rearrange(torch.stack(starts), "axes f h w -> axes (f h w)")
    size = torch.tensor([1, patch_size, patch_size])[:, None]
    intervals = torch.stack((start, start + size), dim=-1)  # (3, N, 2)
    return intervals.expand(shape.batch, -1, -1, -1)


def pixel_intervals(latent: Tensor, scale: ScaleFactors, *, is_causal: bool = True) -> Tensor:
    """Latent intervals (B, 3, N, 2) to pixel frames, rows and columns.

    With `is_causal`, latent 0 covers frame [0, 1) and latent f > 0 the `scale.time` after it.
    """
    pixels = latent * torch.tensor(scale, device=latent.device)[:, None, None]
    if is_causal:
        pixels[:, 0] = (pixels[:, 0] + 1 - scale.time).clamp(min=0)
    return pixels


def to_seconds(pixels: Tensor, fps: float) -> Tensor:
    """Divides the time axis of (B, 3, N, 2) by `fps`; height and width stay in pixels."""
    return torch.cat((pixels[:, :1] / fps, pixels[:, 1:]), dim=1)


def audio_times(
    num_frames: int,
    *,
    start: int = 0,  # index of the first latent frame
    sample_rate: int = 16000,  # Hz
    hop_length: int = 160,  # samples per spectrogram column
    downsample: int = 4,  # columns per latent frame
    is_causal: bool = True,
) -> Tensor:
    """(1, 1, T, 2) float32 seconds. A causal codec's first latent covers a single column."""
    columns = torch.arange(start, start + num_frames + 1) * downsample
    if is_causal:
        columns = (columns + 1 - downsample).clamp(min=0)
    seconds = columns.float() * hop_length / sample_rate
    return torch.stack((seconds[:-1], seconds[1:]), dim=-1)[None, None]


def snap_num_frames(num_frames: int, time_scale: int = 8) -> int:
    """The largest `time_scale k + 1` that is not above `num_frames` (at least 1)."""
    return max(0, num_frames - 1) // time_scale * time_scale + 1


def num_frames_for(
    duration_s: float,
    fps: float,
    *,
    time_scale: int = 8,
    min_s: float = 1.0,
    max_s: float = 20.0,
) -> int:
    """A clip length on the codec's grid for a duration, which is first kept to [min_s, max_s].

    Rounded down; up where that would end below `min_s`.
    """
    duration_s = min(max(duration_s, min_s), max_s)
    num_frames = snap_num_frames(int(duration_s * fps), time_scale)
    return num_frames if num_frames / fps >= min_s else num_frames + time_scale


def slot_frames(num_slots: int, num_frames: int) -> list[int]:
    """Pixel frames that split a clip evenly, for generated keyframe slots (ends left out)."""
    return [round(i * (num_frames - 1) / (num_slots + 1)) for i in range(1, num_slots + 1)]
