"""From a language model's hidden states to the contexts that the transformer attends to.

Every layer of the language model is used: the states are normalised, laid side by side and
projected (`FeatureExtractor`), then refined by one small transformer a modality (`Connector`).
Padding does not reach the video model: the tokens move to the front and learned registers fill the
rest (registers as in arXiv:2309.16588). From there on every position counts, so that no text mask
is needed downstream.

Two generations differ in the extractor. 2.0 scales each layer by its range over the whole text and
has one projection; 2.3 scales each token by its own root mean square and has one a modality.

Letters: B texts, S tokens, D width of the language model, L its hidden states, R registers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.model.layers import Attention, FeedForward, rms_norm
from aiprod_core.model.rope import Rotary, rotary_table
from aiprod_core.model.transformer import FIXED, PROJECTED_TEXT, is_text_projected, require

# The fixed facts of the shared section that concern the connectors.
FIXED_KEYS = (
    "activation_fn",
    "attention_bias",
    "dropout",
    "norm_elementwise_affine",
    "positional_embedding_type",
    "qk_norm",
    "standardization_norm",
)


@dataclass(frozen=True)
class ConnectorConfig:
    """One modality's connector. `num_registers` follows the file's tensor, not its config."""

    heads: int = 30
    head_dim: int = 128
    num_layers: int = 2
    num_registers: int = 128
    max_position: int = 1
    theta: float = 10000.0
    is_interleaved: bool = False
    frequencies_in_float64: bool = False
    is_gated: bool = False
    ff_bias: bool = True

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TextConfig:
    """`num_features` is D * L; `has_own_projections` tells the 2.3 style from the 2.0 style."""

    num_features: int
    video: ConnectorConfig
    audio: ConnectorConfig
    has_own_projections: bool = False

    @classmethod
    def from_metadata(
        cls, config: Mapping[str, Any], hidden_size: int = 3840, num_states: int = 49
    ) -> "TextConfig":
        """Reads a checkpoint's `transformer` section; the sizes are the language model's.

        Published sections do not hold those sizes or the register count (for a new model,
        `connector_num_learnable_registers`): `resized` takes them from the file's tensors. Raises
        CheckpointError naming an unsupported key and value.
        """
        for key in FIXED_KEYS:
            value = config.get(key, FIXED[key])
            require(key, value, value == FIXED[key], str(FIXED[key]))
        max_positions = config.get("connector_positional_embedding_max_pos", [1])
        require("connector_positional_embedding_max_pos", max_positions,
                len(max_positions) == 1, "one number")  # fmt: skip
        rope_type = config.get("rope_type", "split")
        require("rope_type", rope_type, rope_type in ("split", "interleaved"),
                "split or interleaved")  # fmt: skip
        precision = config.get("frequencies_precision")
        is_known = precision in (None, False, "off", "float32", "float64")
        require("frequencies_precision", precision, is_known, "float64 or null")
        video = ConnectorConfig(
            heads=config.get("connector_num_attention_heads", 30),
            head_dim=config.get("connector_attention_head_dim", 128),
            num_layers=config.get("connector_num_layers", 2),
            num_registers=config.get("connector_num_learnable_registers", 128),
            max_position=max_positions[0],
            theta=config.get("positional_embedding_theta", 10000.0),
            is_interleaved=rope_type == "interleaved",
            frequencies_in_float64=precision == "float64",
            is_gated=config.get("connector_apply_gated_attention", False),
            ff_bias=config.get("connector_ff_bias", True),
        )
        audio = replace(
            video,
            heads=config.get("audio_connector_num_attention_heads", video.heads),
            head_dim=config.get("audio_connector_attention_head_dim", video.head_dim),
            num_layers=config.get("audio_connector_num_layers", video.num_layers),
        )
        for prefix, connector in (("", video), ("audio_", audio)):
            require(f"{prefix}connector_attention_head_dim", connector.head_dim,
                    connector.head_dim % 2 == 0,
                    "even, since rotary embedding turns pairs")  # fmt: skip
        has_own_projections = is_text_projected(config)
        if not has_own_projections and video.width != audio.width:
            raise CheckpointError(
                f"transformer config: the audio connector's heads x head_dim is {audio.width} and "
                f"the video connector's {video.width}; without caption_proj_before_connector both "
                "read the same features and must be equal"
            )
        return cls(hidden_size * num_states, video, audio, has_own_projections)

    def to_metadata(self) -> dict[str, Any]:
        """The keys that `from_metadata` reads, to merge into a new file's `transformer` section."""
        section = {
            "connector_num_attention_heads": self.video.heads,
            "connector_attention_head_dim": self.video.head_dim,
            "connector_num_layers": self.video.num_layers,
            "connector_num_learnable_registers": self.video.num_registers,
            "audio_connector_num_attention_heads": self.audio.heads,
            "audio_connector_attention_head_dim": self.audio.head_dim,
            "audio_connector_num_layers": self.audio.num_layers,
            "connector_positional_embedding_max_pos": [self.video.max_position],
            "connector_apply_gated_attention": self.video.is_gated,
            "connector_ff_bias": self.video.ff_bias,
            "positional_embedding_theta": self.video.theta,
            "rope_type": "interleaved" if self.video.is_interleaved else "split",
            "frequencies_precision": "float64" if self.video.frequencies_in_float64 else None,
        }
        return section | PROJECTED_TEXT if self.has_own_projections else section

    def resized(
        self, num_features: int, video_registers: int, audio_registers: int
    ) -> "TextConfig":
        """The same with the sizes that only the tensors of a file tell."""
        return replace(
            self,
            num_features=num_features,
            video=replace(self.video, num_registers=video_registers),
            audio=replace(self.audio, num_registers=audio_registers),
        )


class TextProjector(nn.Module):
    """Hidden states of the language model -> video and audio contexts."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.feature_extractor = FeatureExtractor(config)
        self.video_connector = Connector(config.video)
        self.audio_connector = Connector(config.audio)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states (B, S, D, L), mask (B, S) with 1 on tokens, padded on either side.

        Returns the video context (B, S, video width), the audio context (B, S, audio width) and
        the mask that goes with them, all ones. S must be a multiple of both register counts, D * L
        what the projection takes; InputError otherwise.
        """
        return self.connect(*self.feature_extractor(hidden_states, mask), mask)

    def connect(
        self, video_features: Tensor, audio_features: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what the feature extractor made, (B, S, width) each."""
        order = tokens_first(mask)
        is_token = mask.bool().gather(1, order)
        video = self.video_connector(reorder(video_features, order), is_token)
        audio = self.audio_connector(reorder(audio_features, order), is_token)
        return video, audio, torch.ones_like(mask)


class FeatureExtractor(nn.Module):
    """Normalises all hidden states of a token and projects them, laid side by side."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_features = config.num_features
        self.has_own_projections = config.has_own_projections
        if config.has_own_projections:
            self.video_aggregate_embed = nn.Linear(config.num_features, config.video.width)
            self.audio_aggregate_embed = nn.Linear(config.num_features, config.audio.width)
        else:
            self.aggregate_embed = nn.Linear(config.num_features, config.video.width, bias=False)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D, L), (B, S) -> features of both modalities (B, S, width), in token order."""
        hidden_size, num_states = hidden_states.shape[2:]
        if hidden_size * num_states != self.num_features:
            raise InputError(
                f"the text encoder gives {num_states} hidden states of width {hidden_size}, "
                f"{hidden_size * num_states} features a token; this model takes "
                f"{self.num_features}: use the encoder it was trained with"
            )
        if not self.has_own_projections:
            x = scale_by_range(hidden_states.float(), mask)
            features = self.aggregate_embed(x.to(self.aggregate_embed.weight.dtype))
            return features, features
        x = scale_by_rms(hidden_states.float(), mask)
        return (
            self._project(x, self.video_aggregate_embed, hidden_size),
            self._project(x, self.audio_aggregate_embed, hidden_size),
        )

    def _project(self, x: Tensor, projection: nn.Linear, hidden_size: int) -> Tensor:
        x = x * math.sqrt(projection.out_features / hidden_size)
        return projection(x.to(projection.weight.dtype))


class Connector(nn.Module):
    """A transformer over the text of one modality, with learned registers in place of padding."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.learnable_registers = nn.Parameter(
            0.02 * torch.randn(config.num_registers, config.width)
        )
        self.transformer_1d_blocks = nn.ModuleList(
            ConnectorBlock(config) for _ in range(config.num_layers)
        )

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        """x (B, S, width), tokens first; is_token (B, S) boolean. Returns (B, S, width)."""
        length, count = x.shape[1], self.config.num_registers
        if length % count:
            raise InputError(
                f"the text has {length} positions, which must be a multiple of the "
                f"{count} registers; pad it to {math.ceil(length / count) * count}"
            )
        registers = self.learnable_registers.repeat(length // count, 1)  # (S, width)
        x = torch.where(is_token[..., None], x, registers)
        rotary = rotary_table(
            torch.arange(length, device=x.device)[None, None],
            (self.config.max_position,),
            self.config.width,
            theta=self.config.theta,
            is_interleaved=self.config.is_interleaved,
            in_float64=self.config.frequencies_in_float64,
        )
        for block in self.transformer_1d_blocks:
            x = block(x, rotary)
        return rms_norm(x)


class ConnectorBlock(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.attn1 = Attention(
            config.width, heads=config.heads, head_dim=config.head_dim, is_gated=config.is_gated
        )
        self.ff = FeedForward(config.width, bias=config.ff_bias)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.attn1(rms_norm(x), rotary=rotary)
        return x + self.ff(rms_norm(x))


def scale_by_range(x: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """2.0: `8 (x - mean) / (max - min)` a text and layer, over its tokens and all dimensions.

    (B, S, D, L) -> (B, S, D * L), zero on padding, whose content is never read.
    """
    is_token = mask.bool()[:, :, None, None]
    count = is_token.sum(dim=1, keepdim=True) * x.shape[2]
    mean = x.masked_fill(~is_token, 0).sum(dim=(1, 2), keepdim=True) / (count + eps)
    lowest = x.masked_fill(~is_token, math.inf).amin(dim=(1, 2), keepdim=True)
    highest = x.masked_fill(~is_token, -math.inf).amax(dim=(1, 2), keepdim=True)
    x = 8 * (x - mean) / (highest - lowest + eps)
    return rearrange(x.masked_fill(~is_token, 0), "b s d l -> b s (d l)")


def scale_by_rms(x: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """2.3: each token and layer divided by its root mean square over D.

    (B, S, D, L) -> (B, S, D * L), zero on padding, whose content is never read.
    """
    x = x * torch.rsqrt(x.square().mean(dim=2, keepdim=True) + eps)
    x = x.masked_fill(~mask.bool()[:, :, None, None], 0)
    return rearrange(x, "b s d l -> b s (d l)")


def tokens_first(mask: Tensor) -> Tensor:
    """The order (B, S) of positions that puts tokens before padding and keeps each in sequence."""
    return torch.argsort((~mask.bool()).to(torch.uint8), dim=1, stable=True)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """x (B, S, D) with its positions taken in `order` (B, S)."""
    return x.gather(1, order[..., None].expand_as(x))
