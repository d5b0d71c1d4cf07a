"""The joint audio-video diffusion transformer of the LTX-2 family (2.0, 2.3 and 2.5's options).

Two streams of tokens, video and audio, pass through the same blocks: each attends to itself, to its
text, to the other stream, and through a feed-forward network. Noise levels steer every step through
scales, shifts and gates. The network predicts the velocity of the flow from data to noise.

Letters: B batch, N tokens, S text tokens, C channels, D model width, rows modulation vectors.
A modulation's token axis has length 1 when all tokens of a sample share a noise level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.model.layers import AdaLayerNormSingle, Attention, FeedForward, rms_norm
from aiprod_core.model.rope import Rotary, rotary_table
from aiprod_core.types import Modality

# What every published config repeats; another value would need another network.
FIXED = {
    "dropout": 0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "cross_attention_norm": True,
    "standardization_norm": "rms_norm",
    "qk_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "positional_embedding_type": "rope",
    "use_middle_indices_grid": True,
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "only_cross_attention": False,
    "double_self_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
    "num_vector_embeds": None,
}

# Together these say that the text arrives projected (2.3); 2.0 files have none of them.
PROJECTED_TEXT = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches under their published names; the defaults are those of an absent key.

    `caption_channels` is the width of 2.0's text, which the transformer itself projects; None when
    the text arrives at the stream's width (2.3). `has_video` and `has_audio` are ours: a network of
    one stream, for training or for sound alone.
    """

    num_attention_heads: int = 32
    attention_head_dim: int = 128
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    num_layers: int = 48
    cross_attention_dim: int = 4096
    audio_cross_attention_dim: int = 2048
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0
    positional_embedding_max_pos: tuple[int, ...] = (20, 2048, 2048)
    audio_positional_embedding_max_pos: tuple[int, ...] = (20,)
    timestep_scale_multiplier: float = 1000
    av_ca_timestep_scale_multiplier: float = 1
    rope_type: str = "split"
    frequencies_precision: str | None = None
    caption_channels: int | None = None
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False
    use_prompt_adaln_single: bool = True
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_keyframes_abs_pos_embedding: bool = False
    has_video: bool = True
    has_audio: bool = True

    def __post_init__(self) -> None:
        """Raises CheckpointError for values that contradict each other or are not supported."""
        require("rope_type", self.rope_type, self.rope_type in ("split", "interleaved"),
                 "split or interleaved")  # fmt: skip
        require("frequencies_precision", self.frequencies_precision,
                 self.frequencies_precision in (None, "float64"), "float64 or null")  # fmt: skip
        if not (self.has_video or self.has_audio):
            raise CheckpointError("has_video and has_audio are both false; one stream is needed")
        if self.is_joint:
            require("audio_num_attention_heads", self.audio_num_attention_heads,
                     self.audio_num_attention_heads == self.num_attention_heads,
                     f"num_attention_heads, {self.num_attention_heads}")  # fmt: skip
        if self.has_video:
            self._check_stream("", self.width, self.cross_attention_dim, 3)
        if self.has_audio:
            self._check_stream("audio_", self.audio_width, self.audio_cross_attention_dim, 1)

    def _check_stream(self, prefix: str, width: int, context_width: int, axes: int) -> None:
        head_dim = getattr(self, f"{prefix}attention_head_dim")
        require(f"{prefix}attention_head_dim", head_dim, head_dim % 2 == 0,
                 "even, since rotary embedding turns pairs")  # fmt: skip
        require(f"{prefix}cross_attention_dim", context_width, context_width == width,
                 f"heads x head_dim, {width}")  # fmt: skip
        limits = getattr(self, f"{prefix}positional_embedding_max_pos")
        require(f"{prefix}positional_embedding_max_pos", limits, len(limits) == axes,
                 f"{axes} number{'s' if axes > 1 else ''}, one per axis")  # fmt: skip

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_width(self) -> int:
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def is_joint(self) -> bool:
        return self.has_video and self.has_audio

    @property
    def num_modulations(self) -> int:
        """Shift, scale and gate for self-attention and feed-forward, and in 2.3 for the text."""
        return 9 if self.cross_attention_adaln else 6

    @property
    def has_prompt_modulation(self) -> bool:
        return self.cross_attention_adaln and self.use_prompt_adaln_single

    @classmethod
    def from_metadata(cls, section: Mapping[str, Any]) -> "TransformerConfig":
        """From the header's `config.transformer`. Raises CheckpointError naming key and value."""
        for key, value in FIXED.items():
            if key in section:
                require(key, section[key], section[key] == value, str(value))
        values = {f.name: section[f.name] for f in fields(cls) if f.name in section}
        for key in ("positional_embedding_max_pos", "audio_positional_embedding_max_pos"):
            if key in values:
                values[key] = tuple(values[key])
        if values.get("frequencies_precision") in (False, "off", "float32"):
            values["frequencies_precision"] = None
        if is_text_projected(section):
            values["caption_channels"] = None
        elif values.get("caption_channels") is None:
            raise CheckpointError(
                "transformer config: caption_channels is missing; a file whose text arrives "
                f"unprojected must give it, other files {', '.join(PROJECTED_TEXT)}"
            )
        return cls(**values)

    def to_metadata(self) -> dict[str, Any]:
        """The inverse of `from_metadata`, with the keys that published files repeat."""
        section: dict[str, Any] = {"_class_name": "AVTransformer3DModel", **FIXED}
        for field in fields(self):
            value = getattr(self, field.name)
            section[field.name] = list(value) if isinstance(value, tuple) else value
        if self.caption_channels is None:
            del section["caption_channels"]
            section |= PROJECTED_TEXT
        for key in ("has_video", "has_audio"):
            if section[key]:  # not a published key: named only where it changes something
                del section[key]
        return section


def is_text_projected(section: Mapping[str, Any]) -> bool:
    """Whether a `transformer` section has 2.3's text projection. Raises CheckpointError between."""
    present = [key for key in PROJECTED_TEXT if key in section]
    for key in present:
        require(key, section[key], section[key] is PROJECTED_TEXT[key], str(PROJECTED_TEXT[key]))
    if present and len(present) < len(PROJECTED_TEXT):
        missing = [key for key in PROJECTED_TEXT if key not in section]
        raise CheckpointError(
            f"transformer config: {', '.join(present)} without {', '.join(missing)}; "
            "a text projection is described by all four keys or none"
        )
    return bool(present)


def require(key: str, value: Any, is_supported: bool, supported: str) -> None:
    """Raises CheckpointError naming the key, the value and what it must be."""
    if not is_supported:
        raise CheckpointError(f"transformer config: {key} is {value!r}; it must be {supported}")


PerturbationKind = Literal[
    "SKIP_VIDEO_SELF_ATTN", "SKIP_AUDIO_SELF_ATTN", "SKIP_A2V_CROSS_ATTN", "SKIP_V2A_CROSS_ATTN"
]


@dataclass(frozen=True)
class Perturbations:
    """What guidance switches off: for each sample of the batch, {kind: blocks, or None for all}.

    A skipped self-attention passes every token its own value; a skipped cross-modal attention adds
    nothing. `Perturbations(({}, {"SKIP_VIDEO_SELF_ATTN": (29,)}))` perturbs the second sample.
    """

    samples: tuple[Mapping[PerturbationKind, Sequence[int] | None], ...]

    def __post_init__(self) -> None:
        for sample in self.samples:
            for kind in sample:
                if kind not in get_args(PerturbationKind):
                    raise InputError(
                        f'no perturbation "{kind}"; try {", ".join(get_args(PerturbationKind))}'
                    )

    def keep(self, kind: PerturbationKind, block: int) -> tuple[bool, ...]:
        """For each sample, whether `block` runs as usual."""
        return tuple(
            kind not in sample or ((blocks := sample[kind]) is not None and block not in blocks)
            for sample in self.samples
        )


class Keep(NamedTuple):
    """What one block runs as usual: all, none, or a boolean (B, 1, 1)."""

    video_self: Tensor | bool = True
    audio_self: Tensor | bool = True
    audio_to_video: Tensor | bool = True
    video_to_audio: Tensor | bool = True


class Stream(NamedTuple):
    """What all blocks are told about one modality beside its tokens."""

    modulation: Tensor  # (B, N or 1, rows, D)
    context: Tensor  # (B, S, D)
    context_bias: Tensor | None  # (B, 1, 1, S)
    prompt_modulation: Tensor | None  # (B, 1, 2, D), shift and scale
    attention_bias: Tensor | None  # (B or 1, 1, N or 1, N)
    rotary: Rotary
    cross_modulation: Tensor | None  # (B, N or 1, 4, D), before the block's table
    cross_gate: Tensor | None  # (B, 1, D)
    cross_rotary: Rotary | None
    is_updated: bool


class Transformer(nn.Module):
    """(video, audio) -> their velocities; a modality that is None stays None."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        rows, text = config.num_modulations, config.caption_channels
        self.prompt_adaln_single = self.audio_prompt_adaln_single = None
        self.caption_projection = self.audio_caption_projection = None
        self.av_ca_video_scale_shift_adaln_single = self.av_ca_a2v_gate_adaln_single = None
        self.av_ca_audio_scale_shift_adaln_single = self.av_ca_v2a_gate_adaln_single = None
        if config.has_video:
            width = config.width
            self.patchify_proj = nn.Linear(config.in_channels, width)
            self.adaln_single = AdaLayerNormSingle(width, rows)
            if config.has_prompt_modulation:
                self.prompt_adaln_single = AdaLayerNormSingle(width, 2)
            if text is not None:
                self.caption_projection = CaptionProjection(text, width)
            if config.use_keyframes_abs_pos_embedding:
                self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, width))
            self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
            self.proj_out = nn.Linear(width, config.out_channels)
        if config.has_audio:
            width = config.audio_width
            self.audio_patchify_proj = nn.Linear(config.audio_in_channels, width)
            self.audio_adaln_single = AdaLayerNormSingle(width, rows)
            if config.has_prompt_modulation:
                self.audio_prompt_adaln_single = AdaLayerNormSingle(width, 2)
            if text is not None:
                self.audio_caption_projection = CaptionProjection(text, width)
            self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, width))
            self.audio_proj_out = nn.Linear(width, config.audio_out_channels)
        if config.is_joint:
            self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(config.width, 4)
            self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(config.width, 1)
            self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(config.audio_width, 4)
            self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(config.audio_width, 1)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(
        self,
        video: Modality | None,
        audio: Modality | None,
        perturbations: Perturbations | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns velocities (B, N, C), in the model's dtype, to which latents and text are cast.

        Timesteps may be (B, 1, 1) where all tokens of a sample share one, which costs one row of
        modulation instead of N; positions may have batch 1 where samples share them.
        """
        self._check(video, audio, perturbations)
        x_v = x_a = video_embedding = audio_embedding = video_stream = audio_stream = None
        if video is not None:
            x_v = self.embed_video(video)
            rotary, cross_rotary = self.rotary_tables(video.positions, is_audio=False)
            video_stream, video_embedding = self._stream(
                video,
                audio,
                adaln=self.adaln_single,
                prompt_adaln=self.prompt_adaln_single,
                caption_projection=self.caption_projection,
                cross_adaln=self.av_ca_video_scale_shift_adaln_single,
                cross_gate_adaln=self.av_ca_a2v_gate_adaln_single,
                rotary=rotary,
                cross_rotary=cross_rotary,
            )
        if audio is not None:
            x_a = self.audio_patchify_proj(audio.latent.to(self.audio_patchify_proj.weight.dtype))
            rotary, cross_rotary = self.rotary_tables(audio.positions, is_audio=True)
            audio_stream, audio_embedding = self._stream(
                audio,
                video,
                adaln=self.audio_adaln_single,
                prompt_adaln=self.audio_prompt_adaln_single,
                caption_projection=self.audio_caption_projection,
                cross_adaln=self.av_ca_audio_scale_shift_adaln_single,
                cross_gate_adaln=self.av_ca_v2a_gate_adaln_single,
                rotary=rotary,
                cross_rotary=cross_rotary,
            )
        device = next(m.latent.device for m in (video, audio) if m is not None)
        keeps = keep_per_block(perturbations, self.config.num_layers, device)
        for block, keep in zip(self.transformer_blocks, keeps, strict=True):
            x_v, x_a = block(x_v, x_a, video_stream, audio_stream, keep)
        if x_v is not None and video_embedding is not None:
            x_v = self.proj_out(output_norm(x_v, self.scale_shift_table, video_embedding))
        if x_a is not None and audio_embedding is not None:
            x_a = self.audio_proj_out(
                output_norm(x_a, self.audio_scale_shift_table, audio_embedding)
            )
        return x_v, x_a

    def embed_video(self, video: Modality) -> Tensor:
        x = self.patchify_proj(video.latent.to(self.patchify_proj.weight.dtype))
        if self.config.use_keyframes_abs_pos_embedding and video.keyframe_marker is not None:
            x = torch.where(video.keyframe_marker > 0, x + self.keyframes_abs_pos_embedding, x)
        return x

    def rotary_tables(self, positions: Tensor, is_audio: bool) -> tuple[Rotary, Rotary | None]:
        """Tables for self-attention and, on time alone, for attention between the modalities.

        positions (B, axes, N, 2) as in `Modality`. Nothing here depends on the noise level.
        """
        config = self.config
        limits = config.positional_embedding_max_pos
        audio_limits = config.audio_positional_embedding_max_pos
        midpoints = positions.float().mean(dim=-1)  # (B, axes, N)

        def table(points: Tensor, limits: tuple[int, ...], width: int) -> Rotary:
            return rotary_table(
                points,
                limits,
                width,
                theta=config.positional_embedding_theta,
                is_interleaved=config.rope_type == "interleaved",
                in_float64=config.frequencies_precision == "float64",
            )

        own_limits, width = (
            (audio_limits, config.audio_width) if is_audio else (limits, config.width)
        )
        own = table(midpoints, own_limits, width)
        if not config.is_joint:
            return own, None
        shared_limit = (max(limits[0], audio_limits[0]),)
        return own, table(midpoints[:, :1], shared_limit, config.audio_cross_attention_dim)

    def _stream(
        self,
        modality: Modality,
        other: Modality | None,
        *,
        adaln: AdaLayerNormSingle,
        prompt_adaln: AdaLayerNormSingle | None,
        caption_projection: nn.Module | None,
        cross_adaln: AdaLayerNormSingle | None,
        cross_gate_adaln: AdaLayerNormSingle | None,
        rotary: Rotary,
        cross_rotary: Rotary | None,
    ) -> tuple[Stream, Tensor]:
        """What the blocks need of one modality, and the timestep embedding for the output."""
        config, dtype = self.config, adaln.linear.weight.dtype
        timesteps = modality.timesteps.squeeze(-1).float() * config.timestep_scale_multiplier
        modulation, embedding = adaln(timesteps)
        cross_modulation = cross_gate = prompt_modulation = None
        if other is not None and cross_adaln is not None and cross_gate_adaln is not None:
            cross_modulation, _ = cross_adaln(timesteps)
            # The gate asks how noisy the stream is that it lets in.
            sigma = other.sigma.float()[:, None] * config.av_ca_timestep_scale_multiplier
            cross_gate = cross_gate_adaln(sigma)[0].squeeze(2)
        if prompt_adaln is not None:
            sigma = modality.sigma.float()[:, None] * config.timestep_scale_multiplier
            prompt_modulation, _ = prompt_adaln(sigma)
        context = modality.context.to(dtype)
        if caption_projection is not None:
            context = caption_projection(context)
        stream = Stream(
            modulation=modulation,
            context=context,
            context_bias=key_mask_bias(modality.context_mask, dtype),
            prompt_modulation=prompt_modulation,
            attention_bias=attention_weight_bias(modality.attention_mask, dtype),
            rotary=rotary,
            cross_modulation=cross_modulation,
            cross_gate=cross_gate,
            cross_rotary=cross_rotary,
            is_updated=modality.enabled,
        )
        return stream, embedding

    def _check(
        self,
        video: Modality | None,
        audio: Modality | None,
        perturbations: Perturbations | None,
    ) -> None:
        given = {"video": video, "audio": audio}
        if video is None and audio is None:
            raise InputError("video and audio are both None; give the transformer one of them")
        for name, modality in given.items():
            if modality is not None and not getattr(self.config, f"has_{name}"):
                raise InputError(f"{name} was given to a transformer without {name} weights")
            if (
                modality is not None
                and perturbations is not None
                and len(perturbations.samples) != len(modality.latent)
            ):
                raise InputError(
                    f"perturbations name {len(perturbations.samples)} samples; "
                    f"the {name} batch has {len(modality.latent)}"
                )


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x (1 + scale) + shift` in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x (B, N, D) normalised, then `(1 + scale)` and `shift` (B or 1, N or 1, D)."""
    return modulate(rms_norm(x, eps), scale, shift)


def gated_sum(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """`x + gate out` in one pass."""
    return torch.addcmul(x, gate, out)


def add_norm(x: Tensor, gate: Tensor | None, out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + gate out`, gate None for 1, and what `rms_norm` makes of it."""
    x = x + out if gate is None else gated_sum(x, gate, out)
    return x, rms_norm(x, eps)


class Block(nn.Module):
    """One layer of both streams. Rows of the tables are named where they are read."""

    # An instance may have a kernel's instead.
    modulated_norm = staticmethod(modulated_norm)
    add_norm = staticmethod(add_norm)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        rows = config.num_modulations
        own = {"eps": config.norm_eps, "is_gated": config.apply_gated_attention}
        width, audio_width = config.width, config.audio_width
        audio_heads = {
            "heads": config.audio_num_attention_heads,
            "head_dim": config.audio_attention_head_dim,
        }
        self.prompt_scale_shift_table = self.audio_prompt_scale_shift_table = None
        if config.has_video:
            heads = {"heads": config.num_attention_heads, "head_dim": config.attention_head_dim}
            self.attn1 = Attention(width, **heads, **own)
            self.attn2 = Attention(width, config.cross_attention_dim, **heads, **own)
            self.ff = FeedForward(width, bias=config.ff_bias)
            self.scale_shift_table = nn.Parameter(torch.zeros(rows, width))
            if config.cross_attention_adaln:
                self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, width))
        if config.has_audio:
            self.audio_attn1 = Attention(audio_width, **audio_heads, **own)
            self.audio_attn2 = Attention(
                audio_width, config.audio_cross_attention_dim, **audio_heads, **own
            )
            self.audio_ff = FeedForward(audio_width, bias=config.audio_ff_bias)
            self.audio_scale_shift_table = nn.Parameter(torch.zeros(rows, audio_width))
            if config.cross_attention_adaln:
                self.audio_prompt_scale_shift_table = nn.Parameter(torch.zeros(2, audio_width))
        if config.is_joint:
            self.audio_to_video_attn = Attention(width, audio_width, **audio_heads, **own)
            self.video_to_audio_attn = Attention(audio_width, width, **audio_heads, **own)
            self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, width))
            self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio_width))

    def forward(
        self,
        x_v: Tensor | None,
        x_a: Tensor | None,
        video: Stream | None,
        audio: Stream | None,
        keep: Keep,
    ) -> tuple[Tensor | None, Tensor | None]:
        """x_v, x_a (B, N, D) of each stream. A stream that is not updated is still read."""
        # Self-attention, then text. What comes of them is normalised for what reads it next.
        normed_v = normed_a = None
        if x_v is not None and video is not None and video.is_updated:
            table = self.scale_shift_table
            x_v, normed_v = self._self_attention(x_v, video, self.attn1, table, keep.video_self)
            x_v, normed_v = self._text_attention(
                x_v, normed_v, video, self.attn2, table, self.prompt_scale_shift_table
            )
        if x_a is not None and audio is not None and audio.is_updated:
            table = self.audio_scale_shift_table
            x_a, normed_a = self._self_attention(
                x_a, audio, self.audio_attn1, table, keep.audio_self
            )
            x_a, normed_a = self._text_attention(
                x_a, normed_a, audio, self.audio_attn2, table, self.audio_prompt_scale_shift_table
            )
        # The other modality; both directions read the streams as they are now.
        if x_v is not None and x_a is not None and video is not None and audio is not None:
            normed_v = rms_norm(x_v, self.eps) if normed_v is None else normed_v
            normed_a = rms_norm(x_a, self.eps) if normed_a is None else normed_a
            x_v, x_a = self._cross_modal_attention(x_v, x_a, normed_v, normed_a, video, audio, keep)
        # Feed-forward.
        if x_v is not None and video is not None and video.is_updated:
            x_v = self.feed_forward(x_v, video, self.ff, self.scale_shift_table)
        if x_a is not None and audio is not None and audio.is_updated:
            x_a = self.feed_forward(x_a, audio, self.audio_ff, self.audio_scale_shift_table)
        return x_v, x_a

    def _self_attention(
        self, x: Tensor, stream: Stream, attn: Attention, table: Tensor, keep: Tensor | bool
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate = rows_of(table, stream.modulation, 0, 3)
        out = attn(
            self.modulated_norm(x, scale, shift, self.eps),
            mask=stream.attention_bias,
            rotary=stream.rotary,
            keep=keep,
        )
        return self.add_norm(x, gate, out, self.eps)

    def _text_attention(
        self,
        x: Tensor,
        normed: Tensor,
        stream: Stream,
        attn: Attention,
        table: Tensor,
        prompt_table: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        context = stream.context
        if prompt_table is None:  # 2.0: neither modulated nor gated
            out = attn(normed, context, mask=stream.context_bias)
            return self.add_norm(x, None, out, self.eps)
        shift, scale, gate = rows_of(table, stream.modulation, 6, 9)
        if stream.prompt_modulation is None:
            context_shift, context_scale = prompt_table.unbind(0)
        else:
            context_shift, context_scale = rows_of(prompt_table, stream.prompt_modulation, 0, 2)
        context = modulate(context, context_scale, context_shift)
        out = attn(modulate(normed, scale, shift), context, mask=stream.context_bias)
        return self.add_norm(x, gate, out, self.eps)

    def _cross_modal_attention(
        self,
        x_v: Tensor,
        x_a: Tensor,
        normed_v: Tensor,
        normed_a: Tensor,
        video: Stream,
        audio: Stream,
        keep: Keep,
    ) -> tuple[Tensor, Tensor]:
        assert video.cross_modulation is not None and audio.cross_modulation is not None
        assert video.cross_gate is not None and audio.cross_gate is not None
        video_table = self.scale_shift_table_a2v_ca_video
        audio_table = self.scale_shift_table_a2v_ca_audio
        if video.is_updated and keep.audio_to_video is not False:
            # Unlike the other tables, these hold the scale before the shift.
            scale_v, shift_v = rows_of(video_table, video.cross_modulation, 0, 2)
            scale_a, shift_a = rows_of(audio_table, audio.cross_modulation, 0, 2)
            out = self.audio_to_video_attn(
                modulate(normed_v, scale_v, shift_v),
                modulate(normed_a, scale_a, shift_a),
                rotary=video.cross_rotary,
                context_rotary=audio.cross_rotary,
            )
            gate = video_table[4] + video.cross_gate
            x_v = gated_sum(x_v, gate * keep.audio_to_video, out)
        if audio.is_updated and keep.video_to_audio is not False:
            scale_v, shift_v = rows_of(video_table, video.cross_modulation, 2, 4)
            scale_a, shift_a = rows_of(audio_table, audio.cross_modulation, 2, 4)
            out = self.video_to_audio_attn(
                modulate(normed_a, scale_a, shift_a),
                modulate(normed_v, scale_v, shift_v),
                rotary=audio.cross_rotary,
                context_rotary=video.cross_rotary,
            )
            gate = audio_table[4] + audio.cross_gate
            x_a = gated_sum(x_a, gate * keep.video_to_audio, out)
        return x_v, x_a

    def feed_forward(self, x: Tensor, stream: Stream, ff: FeedForward, table: Tensor) -> Tensor:
        shift, scale, gate = rows_of(table, stream.modulation, 3, 6)
        return gated_sum(x, gate, ff(self.modulated_norm(x, scale, shift, self.eps)))


class CaptionProjection(nn.Module):
    """2.0's text features (B, S, C) -> (B, S, D)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


def init_weights(transformer: Transformer, generator: torch.Generator | None = None) -> None:
    """Starts training from noise, in place: blocks near the identity, velocity near zero.

    Linear layers are Xavier-uniform; what makes modulations and gates, and the output projections,
    starts small instead of at zero, so that every parameter has a gradient from the first step.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in transformer.named_parameters():
        is_modulation = name.endswith(("_table", "keyframes_abs_pos_embedding")) or (
            "adaln_single.linear.weight" in name
        )
        if is_modulation or "to_gate_logits.weight" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name in ("proj_out.weight", "audio_proj_out.weight"):
            nn.init.normal_(parameter, std=1e-3, generator=generator)


def denoised_from_velocity(latent: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
    """The clean estimate `latent - velocity * timesteps`, computed in float32.

    latent, velocity (B, N, C); timesteps (B, N, 1) or (B, 1, 1). Returns latent's dtype.
    """
    return (latent.float() - velocity.float() * timesteps.float()).to(latent.dtype)


def keep_per_block(
    perturbations: Perturbations | None, num_layers: int, device: torch.device
) -> list[Keep]:
    """What each block keeps. Uniform batches get plain booleans, which skip the work."""
    if perturbations is None:
        return [Keep()] * num_layers
    masks: dict[tuple[bool, ...], Tensor | bool] = {}  # one transfer to the device per pattern

    def mask(kind: PerturbationKind, block: int) -> Tensor | bool:
        flags = perturbations.keep(kind, block)
        if flags not in masks:
            is_uniform = len(set(flags)) == 1
            masks[flags] = (
                flags[0] if is_uniform else torch.tensor(flags, device=device)[:, None, None]
            )
        return masks[flags]

    return [
        Keep(*(mask(kind, block) for kind in get_args(PerturbationKind)))
        for block in range(num_layers)
    ]


def key_mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Text mask (B, S), 1 = attend -> bias (B, 1, 1, S): 0 or the lowest finite number."""
    if mask is None:
        return None
    return ((mask.to(dtype) - 1) * torch.finfo(dtype).max)[:, None, None, :]


def attention_weight_bias(weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Weights in [0, 1], (B, N, N) or (1, 1, N) -> bias `ln(w)` with an axis for the heads.

    A weight scales what a key contributes; 0 becomes the lowest finite number, since rows of
    -infinity would end in NaN.
    """
    if weights is None:
        return None
    limits = torch.finfo(dtype)
    bias = weights.float().clamp(min=limits.tiny).log().to(dtype)
    return bias.masked_fill(weights <= 0, limits.min)[:, None]


def rows_of(table: Tensor, modulation: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
    """Rows of the block's table (rows, D) plus the shared modulation (B, N, rows, D)."""
    return (table[start:stop] + modulation[:, :, start:stop]).unbind(2)


def output_norm(x: Tensor, table: Tensor, embedding: Tensor) -> Tensor:
    """The last normalisation, steered by the timestep's embedding itself, (B, N or 1, D)."""
    shift, scale = (table + embedding[:, :, None]).unbind(2)
    return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), scale, shift)
