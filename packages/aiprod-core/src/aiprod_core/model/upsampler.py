"""Networks that double (or scale by 1.5, 0.75, 4) latents in space, or double them in time.

They work on raw latents, so `upsample_latent` wraps a call in the video VAE's statistics. The
convolutions are ordinary zero-padded ones: nothing here is causal.

Letters: B batch, C channels, F latent frames, H W latent height and width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError
from aiprod_core.model.conv_blocks import PerChannelStatistics, Stride, depth_to_space

GROUPS = 32

# Scales of the rational resampler as (up, down): enlarge by shuffling, then blur with a stride.
RATIOS = {0.75: (3, 4), 1.5: (3, 2), 2.0: (2, 1), 4.0: (4, 1)}


@dataclass(frozen=True)
class UpsamplerConfig:
    """Layout of an upsampler. `spatial_scale` matters to the rational resampler only."""

    in_channels: int = 128
    mid_channels: int = 512
    num_blocks_per_stage: int = 4
    spatial_upsample: bool = True
    temporal_upsample: bool = False
    spatial_scale: float = 2.0
    rational_resampler: bool = False

    def __post_init__(self) -> None:
        if not self.spatial_upsample and not self.temporal_upsample:
            raise CheckpointError(
                "upsampler: spatial_upsample and temporal_upsample are both false; one must be true"
            )
        if self.mid_channels % GROUPS:
            raise CheckpointError(
                f"upsampler: mid_channels {self.mid_channels} is not supported; "
                f"use a multiple of {GROUPS}"
            )
        is_rational = self.rational_resampler and not self.temporal_upsample
        scales = tuple(RATIOS) if is_rational else (2.0,)
        if self.spatial_upsample and self.spatial_scale not in scales:
            raise CheckpointError(
                f"upsampler: spatial_scale {self.spatial_scale} is not supported with "
                f"rational_resampler {is_rational}; use {' or '.join(map(str, scales))}"
            )

    @classmethod
    def from_metadata(cls, config: Mapping[str, Any]) -> "UpsamplerConfig":
        """Reads the file's whole (flat) config.

        Raises CheckpointError for what is not supported, naming key and value.
        """
        for key, supported in (("_class_name", "LatentUpsampler"), ("dims", 3)):
            if config.get(key, supported) != supported:
                raise CheckpointError(
                    f"upsampler: {key} {config[key]!r} is not supported; use {supported!r}"
                )
        known = cls.__dataclass_fields__.keys() & config.keys()
        return cls(**{key: config[key] for key in known if config[key] is not None})

    def to_metadata(self) -> dict[str, Any]:
        """The config that `from_metadata` reads back to an equal one."""
        return {"_class_name": "LatentUpsampler", "dims": 3, **asdict(self)}


class LatentUpsampler(nn.Module):
    """Raw latents (B, C, F, H, W) to larger raw ones; F becomes 2F - 1 when time is doubled."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        mid = config.mid_channels
        self.initial_conv = nn.Conv3d(config.in_channels, mid, 3, padding=1)
        self.initial_norm = nn.GroupNorm(GROUPS, mid)
        self.res_blocks = nn.ModuleList(ResBlock(mid) for _ in range(config.num_blocks_per_stage))
        if config.temporal_upsample:
            self.upsampler: nn.Module = TimeUpsampler(mid, config.spatial_upsample)
        elif config.rational_resampler:
            self.upsampler = RationalResampler(mid, config.spatial_scale)
        else:
            self.upsampler = SpaceUpsampler(mid)
        self.post_upsample_res_blocks = nn.ModuleList(
            ResBlock(mid) for _ in range(config.num_blocks_per_stage)
        )
        self.final_conv = nn.Conv3d(mid, config.in_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = F.silu(self.initial_norm(self.initial_conv(latent)))
        for block in self.res_blocks:
            x = block(x)
        x = self.upsampler(x)
        for block in self.post_upsample_res_blocks:
            x = block(x)
        return self.final_conv(x)


class ResBlock(nn.Module):
    """Two convolutions, each followed by its norm, around the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(x + self.norm2(self.conv2(h)))


class TimeUpsampler(nn.Sequential):
    """Doubles time, and space too when asked; the first frame stands for one, so a copy goes."""

    def __init__(self, channels: int, with_space: bool):
        super().__init__(nn.Conv3d(channels, (8 if with_space else 2) * channels, 3, padding=1))
        self.stride: Stride = (2, 2, 2) if with_space else (2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self[0](x), self.stride)[:, :, 1:]


class SpaceUpsampler(nn.Sequential):
    """Doubles height and width of each frame."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(channels, 4 * channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        frames = F.pixel_shuffle(self[0](frames), 2)
        return rearrange(frames, "(b f) c h w -> b c f h w", b=x.shape[0])


class RationalResampler(nn.Module):
    """Scales each frame by up/down: shuffles to `up` times the size, blurs with stride `down`."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.up, down = RATIOS[scale]
        self.conv = nn.Conv2d(channels, self.up**2 * channels, 3, padding=1)
        self.blur_down = BlurDown(down)

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        frames = self.blur_down(F.pixel_shuffle(self.conv(frames), self.up))
        return rearrange(frames, "(b f) c h w -> b c f h w", b=x.shape[0])


class BlurDown(nn.Module):
    """A fixed 5x5 binomial blur with a stride; nothing at stride 1."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("kernel", torch.outer(row, row)[None, None])  # (1, 1, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        channels = x.shape[1]
        kernel = self.get_buffer("kernel").to(x).expand(channels, 1, 5, 5)
        return F.conv2d(x, kernel, stride=self.stride, padding=2, groups=channels)


def upsample_latent(
    upsampler: LatentUpsampler, latent: Tensor, statistics: PerChannelStatistics
) -> Tensor:
    """Upsamples normalised latents: the network saw raw ones when it was trained."""
    return statistics.normalize(upsampler(statistics.un_normalize(latent)))
