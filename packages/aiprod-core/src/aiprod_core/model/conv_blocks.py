"""The blocks of the video VAE: convolutions over time and space, and what is stacked from them.

`down_block` and `up_block` build one entry of a checkpoint's encoder or decoder list; the classes
follow in the order in which they are needed. Attribute names are those of the checkpoint. Every
block keeps a channels-last tensor channels-last, which is what makes it fast on a CPU.

Letters: B batch, C channels, F frames, H W height and width, (t, y, x) strides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError

# Gives normal noise of the wanted shape.
Draw = Callable[[tuple[int, ...]], Tensor]

Stride = tuple[int, int, int]
STRIDES: dict[str, Stride] = {
    "compress_time": (2, 1, 1),
    "compress_space": (1, 2, 2),
    "compress_all": (2, 2, 2),
}
ENCODER_BLOCKS = (
    *("res_x", "res_x_y", "attn"),
    *STRIDES,
    *(f"{name}_res" for name in STRIDES),
    *(f"{name}_x_y" for name in STRIDES),
)
DECODER_BLOCKS = ("res_x", "res_x_y", "attn", *STRIDES)

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)


@dataclass(frozen=True)
class VAEBlock:
    """One entry of a block list. `multiplier` is how much wider the side nearer the latent is."""

    name: str
    num_layers: int = 1
    multiplier: int = 1
    residual: bool = False
    inject_noise: bool = False

    @property
    def stride(self) -> Stride:
        """How many times the block shrinks or grows time, height and width."""
        return STRIDES.get(self.name.removesuffix("_res").removesuffix("_x_y"), (1, 1, 1))


def down_block(block: VAEBlock, channels: int, padding: PaddingMode) -> tuple[nn.Module, int]:
    """An encoder block, causal, and how many channels it gives."""
    wider = channels * block.multiplier
    if block.name == "res_x":
        return ResGroup(channels, block.num_layers, causal=True, padding=padding), channels
    if block.name == "res_x_y":
        return ResBlock(channels, wider, causal=True, padding=padding), wider
    if block.name == "attn":
        return SpatialAttention(channels), channels
    if block.name.endswith("_res"):
        return SpaceToDepth(channels, wider, block.stride, padding=padding), wider
    # The plain compressions keep their width; only the "_x_y" ones widen.
    out = wider if block.name.endswith("_x_y") else channels
    return CausalConv3d(channels, out, causal=True, padding=padding, stride=block.stride), out


def up_block(
    block: VAEBlock,
    channels: int,
    *,
    causal: bool,
    padding: PaddingMode,
    timestep_conditioning: bool,
) -> tuple[nn.Module, int]:
    """A decoder block and how many channels it gives."""
    narrower = channels // block.multiplier
    if block.name == "res_x":
        group = ResGroup(
            channels,
            block.num_layers,
            causal=causal,
            padding=padding,
            inject_noise=block.inject_noise,
            timestep_conditioning=timestep_conditioning,
        )
        return group, channels
    if block.name == "res_x_y":
        inject = block.inject_noise
        resized = ResBlock(channels, narrower, causal=causal, padding=padding, inject_noise=inject)
        return resized, narrower
    if block.name == "attn":
        return SpatialAttention(channels), channels
    # Published decoders read "residual" on compress_all only.
    residual = block.residual and block.name == "compress_all"
    up = DepthToSpace(
        channels, narrower, block.stride, residual=residual, causal=causal, padding=padding
    )
    return up, narrower


class CausalConv3d(nn.Module):
    """A 3x3x3 convolution that pads time by repeating edge frames.

    Causal: the first frame twice, so no output sees a later input. Otherwise first and last once.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        causal: bool,
        padding: PaddingMode,
        stride: Stride = (1, 1, 1),
    ):
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv3d(
            in_channels, out_channels, 3, stride, padding=(0, 1, 1), padding_mode=padding
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad_time(x))

    def pad_time(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) with two more frames."""
        first = x[:, :, :1]
        frames = [first, first, x] if self.causal else [first, x, x[:, :, -1:]]
        return torch.cat(frames, dim=2)


class ResGroup(nn.Module):
    """`num_layers` residual blocks that share one timestep embedding."""

    def __init__(
        self,
        channels: int,
        num_layers: int,
        *,
        causal: bool,
        padding: PaddingMode,
        inject_noise: bool = False,
        timestep_conditioning: bool = False,
    ):
        super().__init__()
        self.time_embedder = TimestepEmbedder(4 * channels) if timestep_conditioning else None
        self.res_blocks = nn.ModuleList(
            ResBlock(
                channels,
                channels,
                causal=causal,
                padding=padding,
                inject_noise=inject_noise,
                timestep_conditioning=timestep_conditioning,
            )
            for _ in range(num_layers)
        )

    def forward(
        self, x: Tensor, timestep: Tensor | None = None, draw: Draw | None = None
    ) -> Tensor:
        """`timestep` (B,), already multiplied by the decoder's `timestep_scale_multiplier`."""
        embedding = None
        if self.time_embedder is not None and timestep is not None:
            embedding = self.time_embedder(timestep, x.dtype)  # (B, 4C)
        for block in self.res_blocks:
            x = block(x, embedding, draw)
        return x


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input; with options modulated by time and given noise."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        causal: bool,
        padding: PaddingMode,
        inject_noise: bool = False,
        timestep_conditioning: bool = False,
    ):
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, out_channels, causal=causal, padding=padding)
        self.conv2 = CausalConv3d(out_channels, out_channels, causal=causal, padding=padding)
        self.norm3 = self.conv_shortcut = None
        if in_channels != out_channels:
            self.norm3 = nn.GroupNorm(1, in_channels, eps=1e-6)
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)
        self.per_channel_scale1 = self.per_channel_scale2 = None
        if inject_noise:
            self.per_channel_scale1 = nn.Parameter(torch.zeros(out_channels, 1, 1))
            self.per_channel_scale2 = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.scale_shift_table = None
        if timestep_conditioning:
            table = torch.randn(4, in_channels) / in_channels**0.5
            self.scale_shift_table = nn.Parameter(table)

    def forward(
        self, x: Tensor, embedding: Tensor | None = None, draw: Draw | None = None
    ) -> Tensor:
        """`embedding` (B, 4C) modulates both norms; `draw` gives the (H, W) maps to inject."""
        if self.scale_shift_table is not None and embedding is not None:
            shift1, scale1, shift2, scale2 = modulation(self.scale_shift_table, embedding)
            h = self.conv1(silu_(torch.addcmul(shift1, pixel_norm(x), 1 + scale1)))
            h = inject_noise(h, self.per_channel_scale1, draw)
            h = self.conv2(silu_(torch.addcmul(shift2, pixel_norm(h), 1 + scale2)))
        else:
            h = self.conv1(silu_(pixel_norm(x)))
            h = inject_noise(h, self.per_channel_scale1, draw)
            h = self.conv2(silu_(pixel_norm(h)))
        h = inject_noise(h, self.per_channel_scale2, draw)
        if self.norm3 is not None and self.conv_shortcut is not None:
            x = self.conv_shortcut(self.norm3(x))
        return h.add_(x)  # h is a convolution's own output, which nothing else reads


class SpaceToDepth(nn.Module):
    """Halves axes by moving pixels into channels, beside a shortcut that averages channels."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: Stride, *, padding: PaddingMode
    ):
        super().__init__()
        self.stride = stride
        cells = math.prod(stride)
        if out_channels % cells or in_channels * cells % out_channels:
            raise CheckpointError(
                f"vae: encoder_blocks cannot compress {in_channels} channels to {out_channels} "
                f"with stride {stride}: the widths do not divide"
            )
        self.averaged = in_channels * cells // out_channels
        self.conv = CausalConv3d(in_channels, out_channels // cells, causal=True, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:  # the grid is causal: frame 0 stands alone, so it is doubled
            x = torch.cat([x[:, :, :1], x], dim=2)
        shortcut = space_to_depth(x, self.stride)
        if self.averaged > 1:
            shortcut = shortcut.unflatten(1, (-1, self.averaged)).mean(dim=2)
        return space_to_depth(self.conv(x), self.stride).add_(shortcut)


class DepthToSpace(nn.Module):
    """Doubles axes by moving channels into pixels, optionally beside a shortcut alike."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride,
        *,
        residual: bool,
        causal: bool,
        padding: PaddingMode,
    ):
        super().__init__()
        self.stride = stride
        cells = math.prod(stride)
        if residual and (in_channels % cells or out_channels * cells % in_channels):
            raise CheckpointError(
                f"vae: decoder_blocks compress_all cannot be residual from {in_channels} to "
                f"{out_channels} channels: the widths do not divide"
            )
        self.repeats = out_channels * cells // in_channels if residual else 0
        self.conv = CausalConv3d(in_channels, out_channels * cells, causal=causal, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        up = depth_to_space(self.conv(x), self.stride)
        if self.repeats:
            shortcut = depth_to_space(x, self.stride)
            # Repeated over the channels, without a copy that holds the repetition.
            up.unflatten(1, (self.repeats, -1)).add_(shortcut[:, None])
        return up[:, :, 1:] if self.stride[0] == 2 else up  # frame 0 stands for one frame, not two


class SpatialAttention(nn.Module):
    """Single-head attention between the pixels of each frame, plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, _ = x.shape
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        qkv = rearrange(
            self.to_qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3
        )
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        mixed = self.proj(rearrange(mixed, "n 1 (h w) c -> n c h w", h=height))
        return x + rearrange(mixed, "(b f) c h w -> b c f h w", b=batch)


class ChannelNorm(nn.Module):
    """Scales each pixel's channels to unit root mean square, times `gamma`."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class TimestepEmbedder(nn.Module):
    """(B,) timesteps to (B, width): 256 sinusoids, cosines first, then a two-layer network."""

    def __init__(self, width: int):
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(256, width), "linear_2": nn.Linear(width, width)}
        )

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        exponent = torch.arange(128, dtype=torch.float32, device=timestep.device) / 128
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        layers = self.timestep_embedder
        return layers["linear_2"](F.silu(layers["linear_1"](waves)))


class PerChannelStatistics(nn.Module):
    """Mean and standard deviation of each latent channel, kept with the VAE.

    The transformer works on normalised latents, the VAE's convolutions on raw ones.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(channels))
        self.register_buffer("std-of-means", torch.ones(channels))

    def normalize(self, latent: Tensor) -> Tensor:
        mean, std = self._columns(latent)
        return (latent - mean) / std

    def un_normalize(self, latent: Tensor) -> Tensor:
        mean, std = self._columns(latent)
        return latent * std + mean

    def _columns(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.get_buffer("mean-of-means"), self.get_buffer("std-of-means")
        return mean.to(latent)[:, None, None, None], std.to(latent)[:, None, None, None]


def pixel_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean over channels of x^2 + 1e-8), without a weight."""
    # The norm reads x once; squares and their mean would be two passes and a tensor more.
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * torch.rsqrt(norm.square() / x.shape[1] + 1e-8)


def silu_(x: Tensor) -> Tensor:
    """SiLU, in place."""
    return F.silu(x, inplace=True)


def modulation(table: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
    """Table (n, C) plus embedding (B, nC) as n tensors (B, C, 1, 1, 1)."""
    rows = table.to(embedding) + embedding.unflatten(1, table.shape)  # (B, n, C)
    return rows[..., None, None, None].unbind(1)


def inject_noise(x: Tensor, scale: Tensor | None, draw: Draw | None) -> Tensor:
    """Adds scale (C, 1, 1) times one noise map, the same for all channels and frames."""
    if scale is None or draw is None:
        return x
    noise = draw((x.shape[-2], x.shape[-1]))
    return x + (scale * noise)[:, None]  # (C, 1, H, W)


# The four layout changes write channels-last memory: with the usual order each convolution on a CPU
# would convert its input back.


def space_to_depth(x: Tensor, stride: Stride) -> Tensor:
    """(B, C, tF, yH, xW) to (B, Ctyx, F, H, W), channels in the order (c, t, y, x)."""
    pattern = "b c (f t) (h y) (w x) -> b f h w (c t y x)"
    return rearrange(x, pattern, t=stride[0], y=stride[1], x=stride[2]).movedim(-1, 1)


def depth_to_space(x: Tensor, stride: Stride) -> Tensor:
    """The inverse of `space_to_depth`."""
    pattern = "b (c t y x) f h w -> b (f t) (h y) (w x) c"
    return rearrange(x, pattern, t=stride[0], y=stride[1], x=stride[2]).movedim(-1, 1)


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """(B, c, F, H, W) to (B, c p p, F, H/p, W/p); in a patch, columns come before rows."""
    pattern = "b c f (h y) (w x) -> b f h w (c x y)"
    return rearrange(pixels, pattern, y=patch_size, x=patch_size).movedim(-1, 1)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`."""
    pattern = "b (c x y) f h w -> b f (h y) (w x) c"
    return rearrange(x, pattern, y=patch_size, x=patch_size).movedim(-1, 1)
