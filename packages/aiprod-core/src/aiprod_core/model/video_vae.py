"""The video autoencoder: pixels to latents on a causal grid, and back.

8k+1 frames become k+1 latent frames: the first latent stands for one frame, each later one for
eight (in the released models; the factors follow from the block lists). An image is a clip of one
frame. Pixels are in [-1, 1]; latents are normalised per channel unless said otherwise.

Letters: B batch, C latent channels, F frames, H W height and width, in pixels or latents.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.model.conv_blocks import (
    DECODER_BLOCKS,
    ENCODER_BLOCKS,
    PADDING_MODES,
    CausalConv3d,
    Draw,
    PaddingMode,
    PerChannelStatistics,
    ResBlock,
    ResGroup,
    TimestepEmbedder,
    VAEBlock,
    down_block,
    modulation,
    patchify,
    pixel_norm,
    silu_,
    unpatchify,
    up_block,
)
from aiprod_core.types import ScaleFactors

LOG_VARIANCES = ("uniform", "per_channel", "constant", "none")

# What a timestep-conditioned decoder assumes when it is told nothing.
DECODE_TIMESTEP = 0.05
DECODE_NOISE_SCALE = 0.025


@dataclass(frozen=True)
class VideoVAEConfig:
    """Layout of the autoencoder. Defaults are the released models'.

    `encoder_blocks` run from pixels to latent; `decoder_blocks` are stored pixel side first too, so
    the decoder runs them in reverse.
    """

    encoder_blocks: tuple[VAEBlock, ...]
    decoder_blocks: tuple[VAEBlock, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    patch_size: int = 4
    encoder_base_channels: int = 128
    decoder_base_channels: int = 128
    latent_log_var: str = "uniform"
    encoder_padding_mode: PaddingMode = "zeros"
    decoder_padding_mode: PaddingMode = "reflect"
    causal_decoder: bool = False
    timestep_conditioning: bool = False

    def __post_init__(self) -> None:
        _require("latent_log_var", self.latent_log_var, LOG_VARIANCES)
        _require("encoder padding mode", self.encoder_padding_mode, PADDING_MODES)
        _require("decoder padding mode", self.decoder_padding_mode, PADDING_MODES)
        for block in self.encoder_blocks:
            _require("encoder_blocks", block.name, ENCODER_BLOCKS)
            if block.inject_noise:
                raise CheckpointError("vae: encoder_blocks inject_noise true is not supported")
        for block in self.decoder_blocks:
            _require("decoder_blocks", block.name, DECODER_BLOCKS)

    @property
    def scale(self) -> ScaleFactors:
        """Frames, rows and columns of pixels that one latent covers."""
        return scale_factors(self.encoder_blocks or self.decoder_blocks, self.patch_size)

    @classmethod
    def from_metadata(cls, section: Mapping[str, Any]) -> "VideoVAEConfig":
        """Reads the header's `vae` section.

        Raises CheckpointError for what is not supported, naming key and value.
        """
        for key, supported in (
            ("_class_name", "CausalVideoAutoencoder"),
            ("dims", 3),
            ("norm_layer", "pixel_norm"),
            ("use_quant_conv", False),
            ("normalize_latent_channels", False),
        ):
            _require(key, section.get(key, supported), (supported,))
        if not section.get("encoder_blocks") and not section.get("decoder_blocks"):
            raise CheckpointError("vae: the config has neither encoder_blocks nor decoder_blocks")
        spatial = section.get("spatial_padding_mode")
        latent_channels = section.get("latent_channels", cls.latent_channels)
        return cls(
            encoder_blocks=_read_blocks(section, "encoder_blocks"),
            decoder_blocks=_read_blocks(section, "decoder_blocks"),
            in_channels=section.get("in_channels", cls.in_channels),
            out_channels=section.get("out_channels", cls.out_channels),
            latent_channels=latent_channels,
            patch_size=section.get("patch_size", cls.patch_size),
            encoder_base_channels=section.get("encoder_base_channels", latent_channels),
            decoder_base_channels=section.get("decoder_base_channels", cls.decoder_base_channels),
            latent_log_var=section.get("latent_log_var", cls.latent_log_var),
            encoder_padding_mode=spatial or section.get("encoder_spatial_padding_mode", "zeros"),
            decoder_padding_mode=spatial or "reflect",
            causal_decoder=section.get("causal_decoder", False),
            # Published files that predate the key have a conditioned decoder.
            timestep_conditioning=section.get("timestep_conditioning", True),
        )

    def to_metadata(self) -> dict[str, Any]:
        """The `vae` section that `from_metadata` reads back to an equal config.

        Raises InputError for padding modes that the published keys cannot say.
        """
        padding = {"spatial_padding_mode": self.decoder_padding_mode}
        if self.encoder_padding_mode != self.decoder_padding_mode:
            if self.decoder_padding_mode != "reflect":
                raise InputError(
                    f"vae: padding modes {self.encoder_padding_mode} (encoder) and "
                    f"{self.decoder_padding_mode} (decoder) have no published keys; use the same "
                    "mode for both, or reflect for the decoder"
                )
            padding = {"encoder_spatial_padding_mode": self.encoder_padding_mode}
        return {
            "_class_name": "CausalVideoAutoencoder",
            "dims": 3,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "latent_channels": self.latent_channels,
            "patch_size": self.patch_size,
            "norm_layer": "pixel_norm",
            "latent_log_var": self.latent_log_var,
            "use_quant_conv": False,
            "normalize_latent_channels": False,
            "causal_decoder": self.causal_decoder,
            "timestep_conditioning": self.timestep_conditioning,
            "encoder_base_channels": self.encoder_base_channels,
            "decoder_base_channels": self.decoder_base_channels,
            "encoder_blocks": [_publish_block(block) for block in self.encoder_blocks],
            "decoder_blocks": [_publish_block(block) for block in self.decoder_blocks],
            **padding,
        }


class VideoEncoder(nn.Module):
    """Pixels (B, 3, F, H, W) in [-1, 1] to normalised mean latents (B, C, F', H', W')."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        if not config.encoder_blocks:
            raise CheckpointError("vae: the config has no encoder_blocks")
        self.config = config
        self.scale = scale_factors(config.encoder_blocks, config.patch_size)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)
        padding = config.encoder_padding_mode
        channels = config.encoder_base_channels
        pixels = config.in_channels * config.patch_size**2
        self.conv_in = CausalConv3d(pixels, channels, causal=True, padding=padding)
        self.down_blocks = nn.ModuleList()
        for entry in config.encoder_blocks:
            block, channels = down_block(entry, channels, padding)
            self.down_blocks.append(block)
        extra = {"uniform": 1, "per_channel": config.latent_channels, "constant": 1, "none": 0}
        out = config.latent_channels + extra[config.latent_log_var]
        self.conv_out = CausalConv3d(channels, out, causal=True, padding=padding)

    def forward(self, pixels: Tensor) -> Tensor:
        """Frames beyond the causal grid (8k+1 in LTX-2) are left out at the end.

        Raises InputError when height or width is off the grid.
        """
        return self.per_channel_statistics.normalize(self.moments(pixels)[0])

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw mean (B, C, ...) and log-variance (B, C or 1, ...), or None where none is learnt."""
        height, width = pixels.shape[-2:]
        if height % self.scale.height or width % self.scale.width:
            raise InputError(
                f"height and width must be multiples of {self.scale.height} and "
                f"{self.scale.width}; got {height} and {width}"
            )
        _check_reflection(
            self.config.encoder_padding_mode, height // self.scale.height, width // self.scale.width
        )
        num_frames = (pixels.shape[2] - 1) // self.scale.time * self.scale.time + 1
        x = patchify(pixels[:, :, :num_frames], self.config.patch_size)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(silu_(pixel_norm(x)))
        mean, rest = x.tensor_split([self.config.latent_channels], dim=1)
        return mean, rest if self.config.latent_log_var in ("uniform", "per_channel") else None


class VideoDecoder(nn.Module):
    """Normalised latents (B, C, F', H', W') to pixels (B, 3, F, H, W), about [-1, 1], unclipped."""

    timestep_scale_multiplier: Tensor

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        if not config.decoder_blocks:
            raise CheckpointError("vae: the config has no decoder_blocks")
        self.config = config
        self.scale = scale_factors(config.decoder_blocks, config.patch_size)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)
        layout = {"causal": config.causal_decoder, "padding": config.decoder_padding_mode}
        channels = config.decoder_base_channels * math.prod(
            block.multiplier for block in config.decoder_blocks if _narrows(block)
        )
        self.conv_in = CausalConv3d(config.latent_channels, channels, **layout)
        self.up_blocks = nn.ModuleList()
        for entry in reversed(config.decoder_blocks):
            block, channels = up_block(
                entry, channels, timestep_conditioning=config.timestep_conditioning, **layout
            )
            self.up_blocks.append(block)
        self.conv_out = CausalConv3d(channels, config.out_channels * config.patch_size**2, **layout)
        if config.timestep_conditioning:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.last_time_embedder = TimestepEmbedder(2 * channels)
            self.last_scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)

    def forward(
        self,
        latent: Tensor,
        *,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Decodes a whole clip.

        `timestep` (B,) is for timestep-conditioned decoders, 0.05 by default. Such decoders, and
        those that inject noise, draw from `generator`; `noise` gives the draws in order instead.
        Raises InputError for latents too small to be padded by reflection.
        """
        _check_reflection(self.config.decoder_padding_mode, *latent.shape[-2:])
        draw = _draw_from(latent, generator, noise)
        x = latent
        if self.config.timestep_conditioning:
            x = DECODE_NOISE_SCALE * draw(tuple(x.shape)) + (1 - DECODE_NOISE_SCALE) * x
            if timestep is None:
                timestep = latent.new_full((latent.shape[0],), DECODE_TIMESTEP)
            timestep = timestep * self.timestep_scale_multiplier
        x = self.conv_in(self.per_channel_statistics.un_normalize(x))
        for block in self.up_blocks:
            if isinstance(block, ResGroup):
                x = block(x, timestep, draw)
            elif isinstance(block, ResBlock):
                x = block(x, None, draw)
            else:
                x = block(x)
        x = pixel_norm(x)
        if self.config.timestep_conditioning and timestep is not None:
            embedding = self.last_time_embedder(timestep, x.dtype)
            shift, scale = modulation(self.last_scale_shift_table, embedding)
            x = torch.addcmul(shift, x, 1 + scale)
        return unpatchify(self.conv_out(silu_(x)), self.config.patch_size)


def to_frames(pixels: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to (B, F, H, W, 3) in [0, 1]."""
    return rearrange((pixels + 1) / 2, "b c f h w -> b f h w c").clamp(0, 1)


def scale_factors(blocks: Iterable[VAEBlock], patch_size: int) -> ScaleFactors:
    """What the blocks' strides and the patch multiply to."""
    time, height, width = 1, patch_size, patch_size
    for block in blocks:
        t, y, x = block.stride
        time, height, width = time * t, height * y, width * x
    return ScaleFactors(time, height, width)


def _draw_from(
    like: Tensor, generator: torch.Generator | None, noise: Iterable[Tensor] | None
) -> Draw:
    if noise is not None:
        given = iter(noise)
        return lambda shape: next(given).to(like).reshape(shape)
    return lambda shape: torch.randn(
        shape, generator=generator, device=like.device, dtype=like.dtype
    )


def _check_reflection(padding: str, height: int, width: int) -> None:
    if padding == "reflect" and min(height, width) < 2:
        raise InputError(
            f"a VAE that pads by reflection needs at least 2 latents in height and width; got "
            f"{height} and {width}"
        )


def _narrows(block: VAEBlock) -> bool:
    return block.name not in ("res_x", "attn")


def _read_blocks(section: Mapping[str, Any], key: str) -> tuple[VAEBlock, ...]:
    return tuple(_read_block(entry, key) for entry in section.get(key) or ())


def _read_block(entry: Any, key: str) -> VAEBlock:
    """[name, number of layers] or [name, settings], with the published defaults."""
    try:
        name, params = entry
        layers_only = isinstance(params, int)
        settings: dict[str, Any] = {"num_layers": params} if layers_only else dict(params)
    except (TypeError, ValueError):
        raise CheckpointError(f"vae: {key} {entry!r} is not a [name, settings] pair") from None
    unknown = settings.keys() - {"num_layers", "multiplier", "residual", "inject_noise"}
    if unknown:
        name_, value = next((k, settings[k]) for k in sorted(unknown))
        raise CheckpointError(f"vae: {key} {name}: {name_} {value!r} is not supported")
    widens = name == "res_x_y" or (key == "encoder_blocks" and name.endswith(("_res", "_x_y")))
    settings.setdefault("multiplier", 2 if widens else 1)
    return VAEBlock(name, **settings)


def _publish_block(block: VAEBlock) -> list[Any]:
    settings = asdict(block)
    return [settings.pop("name"), settings]


def _require(key: str, value: Any, supported: Iterable[Any]) -> None:
    if value not in supported:
        raise CheckpointError(
            f"vae: {key} {value!r} is not supported; use {' or '.join(map(repr, supported))}"
        )
