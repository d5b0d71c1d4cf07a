"""The audio autoencoder: log-mel spectrograms to latents, 25 a second, and back.

A mel spectrogram is treated as a picture, two channels (left and right) of time rows and frequency
columns; the networks are the familiar 2D autoencoder with convolutions that are causal in time, so
that a later sound never changes an earlier latent. Parameter names are the published ones.

Letters: B batch, C channels, T latent frames, t mel frames, z latent channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError

# Mel frames, and mel bins, per latent: fixed in the published model, whatever its number of levels.
DOWNSAMPLE = 4

CAUSALITY_AXES = ("height", "width", "width-compatibility", "none")


@dataclass(frozen=True)
class AudioVAEConfig:
    """Sizes of the autoencoder and of the mel front end. Defaults are the released model.

    `causality_axis` says which axis of the picture is causal: "height" is time. `attn_resolutions`
    name levels by `resolution` halved once a level, not by the size of the input. The released
    statistics have `base_channels` entries, so there z x bins / 4 equals `base_channels`.
    """

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    in_channels: int = 2
    out_channels: int = 2
    z_channels: int = 8
    mel_bins: int = 64
    norm_type: str = "pixel"
    causality_axis: str = "height"
    mid_block_add_attention: bool = False
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256
    sampling_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 160
    is_causal: bool = True

    def __post_init__(self) -> None:
        if self.causality_axis not in CAUSALITY_AXES:
            raise CheckpointError(
                f'audio_vae: causality_axis "{self.causality_axis}" is not supported; '
                f"use one of {', '.join(CAUSALITY_AXES)}"
            )
        if self.norm_type not in ("pixel", "group"):
            raise CheckpointError(
                f'audio_vae: norm_type "{self.norm_type}" is not supported; use pixel or group'
            )
        if self.norm_type == "group" and self.causality_axis != "none":
            raise CheckpointError(
                'audio_vae: norm_type "group" averages over time, so it is not supported with '
                f'causality_axis "{self.causality_axis}"; use pixel'
            )

    @property
    def latents_per_second(self) -> float:
        return self.sampling_rate / self.hop_length / DOWNSAMPLE

    @property
    def latent_mel_bins(self) -> int:
        return self.mel_bins // DOWNSAMPLE

    @property
    def token_channels(self) -> int:
        """Width of one audio token, channel-major: index = channel x bins + bin."""
        return self.z_channels * self.latent_mel_bins

    @classmethod
    def from_metadata(cls, section: Mapping[str, Any]) -> "AudioVAEConfig":
        """Reads the header's `audio_vae` section.

        Absent attention keys mean *on*, as published. Raises CheckpointError for what is not
        supported, naming key and value.
        """
        params = section.get("model", {}).get("params", {})
        if "ddconfig" not in params:
            raise CheckpointError('audio_vae: the config has no "model.params.ddconfig"')
        network = params["ddconfig"]
        stft = section.get("preprocessing", {}).get("stft", {})
        mel = section.get("preprocessing", {}).get("mel", {})
        for key, supported in (
            ("double_z", True),
            ("attn_type", "vanilla"),
            ("resamp_with_conv", True),
        ):
            if network.get(key, supported) != supported:
                raise CheckpointError(
                    f"audio_vae: {key} {network[key]!r} is not supported; only {supported!r} is"
                )
        mel_bins = network.get("mel_bins") or mel.get("n_mel_channels", cls.mel_bins)
        if mel.get("n_mel_channels", mel_bins) != mel_bins:
            raise CheckpointError(
                f"audio_vae: mel_bins {mel_bins} contradicts n_mel_channels {mel['n_mel_channels']}"
            )
        return cls(
            base_channels=network.get("ch", cls.base_channels),
            channel_multipliers=tuple(network.get("ch_mult", cls.channel_multipliers)),
            num_res_blocks=network.get("num_res_blocks", cls.num_res_blocks),
            in_channels=network.get("in_channels", cls.in_channels),
            out_channels=network.get("out_ch", cls.out_channels),
            z_channels=network.get("z_channels", cls.z_channels),
            mel_bins=mel_bins,
            norm_type=network.get("norm_type", cls.norm_type),
            causality_axis=network.get("causality_axis", cls.causality_axis) or "none",
            mid_block_add_attention=network.get("mid_block_add_attention", True),
            attn_resolutions=tuple(network.get("attn_resolutions", (8, 16, 32)) or ()),
            resolution=network.get("resolution", cls.resolution),
            sampling_rate=params.get("sampling_rate", cls.sampling_rate),
            n_fft=stft.get("filter_length", cls.n_fft),
            hop_length=stft.get("hop_length", cls.hop_length),
            is_causal=stft.get("causal", cls.is_causal),
        )

    def to_metadata(self) -> dict[str, Any]:
        """The `audio_vae` section that `from_metadata` reads back to an equal config."""
        network = {
            "ch": self.base_channels,
            "ch_mult": list(self.channel_multipliers),
            "num_res_blocks": self.num_res_blocks,
            "attn_resolutions": list(self.attn_resolutions),
            "dropout": 0.0,
            "in_channels": self.in_channels,
            "out_ch": self.out_channels,
            "resolution": self.resolution,
            "z_channels": self.z_channels,
            "double_z": True,
            "mid_block_add_attention": self.mid_block_add_attention,
            "norm_type": self.norm_type,
            "causality_axis": self.causality_axis,
            "mel_bins": self.mel_bins,
            "attn_type": "vanilla",
            "resamp_with_conv": True,
        }
        return {
            "model": {"params": {"ddconfig": network, "sampling_rate": self.sampling_rate}},
            "preprocessing": {
                "stft": {
                    "filter_length": self.n_fft,
                    "hop_length": self.hop_length,
                    "causal": self.is_causal,
                },
                "mel": {"n_mel_channels": self.mel_bins},
            },
        }


class AudioEncoder(nn.Module):
    """Log-mel (B, 2, t, bins) to the normalised mean latent (B, z, ceil(t / 4), bins / 4)."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.base_channels
        self.conv_in = CausalConv2d(config.in_channels, width, 3, config.causality_axis)
        self.down = nn.ModuleList()
        last = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(config.channel_multipliers):
            out_width = config.base_channels * multiplier
            stage = Stage(config, width, out_width, config.num_res_blocks, level)
            if level < last:
                stage.downsample = Downsample(out_width, config.causality_axis)
            self.down.append(stage)
            width = out_width
        self.mid = Middle(config, width)
        self.norm_out = make_norm(config.norm_type, width)
        self.conv_out = CausalConv2d(width, 2 * config.z_channels, 3, config.causality_axis)
        self.per_channel_statistics = Statistics(config.token_channels)

    def forward(self, mel: Tensor) -> Tensor:
        mean, _ = self.moments(mel)
        return self.per_channel_statistics.normalise(mean)

    def moments(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, z, T, bins / 4), not normalised."""
        if mel.shape[1] != self.config.in_channels:
            raise InputError(
                f"the audio encoder takes {self.config.in_channels} channels, got {mel.shape[1]}; "
                "give mono sound twice, as left and right"
            )
        x = self.conv_in(mel)
        for stage in self.down:
            x = stage(x)
        x = self.mid(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar


class AudioDecoder(nn.Module):
    """Normalised latent (B, z, T, bins / 4) to log-mel (B, 2, 4T - 3, bins).

    Without a causal axis the result has 4T frames.
    """

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.base_channels * config.channel_multipliers[-1]
        self.conv_in = CausalConv2d(config.z_channels, width, 3, config.causality_axis)
        self.mid = Middle(config, width)
        stages = []
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            out_width = config.base_channels * multiplier
            stage = Stage(config, width, out_width, config.num_res_blocks + 1, level)
            if level > 0:
                stage.upsample = Upsample(out_width, config.causality_axis)
            stages.append(stage)
            width = out_width
        # Stored finest level first, run coarsest level first.
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = make_norm(config.norm_type, width)
        self.conv_out = CausalConv2d(width, config.out_channels, 3, config.causality_axis)
        self.per_channel_statistics = Statistics(config.token_channels)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.per_channel_statistics.denormalise(latent)
        x = self.mid(self.conv_in(x))
        for stage in reversed(self.up):
            x = stage(x)
        mel = self.conv_out(F.silu(self.norm_out(x)))
        frames = DOWNSAMPLE * latent.shape[2]
        if self.config.causality_axis != "none":
            frames -= DOWNSAMPLE - 1  # the first latent stands for a single mel frame
        missing_bins, missing_frames = self.config.mel_bins - mel.shape[3], frames - mel.shape[2]
        return F.pad(mel, (0, missing_bins, 0, missing_frames))  # negative padding crops


class Statistics(nn.Module):
    """Mean and deviation of each entry of an audio token; 0 and 1 until a checkpoint says else."""

    def __init__(self, token_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(token_channels))
        self.register_buffer("std-of-means", torch.ones(token_channels))

    def normalise(self, latent: Tensor) -> Tensor:
        mean, std = self._per_channel_and_bin(latent)
        return (latent - mean) / std

    def denormalise(self, latent: Tensor) -> Tensor:
        mean, std = self._per_channel_and_bin(latent)
        return latent * std + mean

    def _per_channel_and_bin(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.get_buffer("mean-of-means"), self.get_buffer("std-of-means")
        bins = latent.shape[3]
        if latent.shape[1] * bins != len(mean):
            raise InputError(
                f"audio latents of {latent.shape[1]} channels x {bins} bins do not fit the "
                f"{len(mean)} statistics of this model"
            )
        mean = rearrange(mean.to(latent.dtype), "(c bins) -> c 1 bins", bins=bins)
        std = rearrange(std.to(latent.dtype), "(c bins) -> c 1 bins", bins=bins)
        return mean, std


class Stage(nn.Module):
    """One level: residual blocks, each with attention if the level asks for it, then resampling."""

    downsample: nn.Module | None
    upsample: nn.Module | None

    def __init__(
        self, config: AudioVAEConfig, in_width: int, out_width: int, num_blocks: int, level: int
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(num_blocks):
            self.block.append(ResidualBlock(config, out_width if i else in_width, out_width))
            if config.resolution // 2**level in config.attn_resolutions:
                self.attn.append(AttentionBlock(config.norm_type, out_width))
        self.downsample = None
        self.upsample = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    def __init__(self, config: AudioVAEConfig, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(config, width, width)
        has_attention = config.mid_block_add_attention
        self.attn_1 = AttentionBlock(config.norm_type, width) if has_attention else nn.Identity()
        self.block_2 = ResidualBlock(config, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    def __init__(self, config: AudioVAEConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        axis = config.causality_axis
        self.norm1 = make_norm(config.norm_type, in_width)
        self.conv1 = CausalConv2d(in_width, out_width, 3, axis)
        self.norm2 = make_norm(config.norm_type, out_width)
        self.conv2 = CausalConv2d(out_width, out_width, 3, axis)
        self.nin_shortcut = (
            CausalConv2d(in_width, out_width, 1, axis) if in_width != out_width else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """One head over all positions of the picture, so it breaks causality in time."""

    def __init__(self, norm_type: str, width: int) -> None:
        super().__init__()
        self.norm = make_norm(norm_type, width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            rearrange(project(h), "b c t f -> b 1 (t f) c") for project in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "b 1 (t f) c -> b c t f", f=x.shape[3])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves both axes. Zeros before the causal axis, after the other."""

    def __init__(self, width: int, causality_axis: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)
        self.padding = {  # (left, right, top, bottom): frequency, then time
            "height": (0, 1, 2, 0),
            "width": (2, 0, 0, 1),
            "width-compatibility": (1, 0, 0, 1),
            "none": (0, 1, 0, 1),
        }[causality_axis]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Doubles both axes, then drops the first step of the causal one: T frames become 2T - 1."""

    def __init__(self, width: int, causality_axis: str) -> None:
        super().__init__()
        self.conv = CausalConv2d(width, width, 3, causality_axis)
        self.causality_axis = causality_axis

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        if self.causality_axis == "height":
            return x[:, :, 1:]
        if self.causality_axis == "width":
            return x[:, :, :, 1:]
        return x


class CausalConv2d(nn.Module):
    """A convolution that keeps the size, with all zeros in front on the causal axis."""

    def __init__(self, in_width: int, out_width: int, kernel: int, causality_axis: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, kernel)
        before, after = kernel // 2, (kernel - 1) // 2
        frequency, time = (before, after), (before, after)
        if causality_axis == "height":
            time = (kernel - 1, 0)
        elif causality_axis != "none":
            frequency = (kernel - 1, 0)
        self.padding = (*frequency, *time)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class PixelNorm(nn.Module):
    """Divides by the root mean square over channels; eps 1e-6 here, 1e-8 in the video model."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)


def make_norm(norm_type: str, width: int) -> nn.Module:
    return PixelNorm() if norm_type == "pixel" else nn.GroupNorm(32, width, eps=1e-6)
