"""Our networks as those of `diffusers`, with the same weights: the peers of tests and benchmarks.

Names differ, sizes and arithmetic do not. `diffusers` is imported where it is used; it is no
dependency of the engine.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from aiprod_core.model.audio_vae import AudioDecoder
from aiprod_core.model.conv_blocks import VAEBlock
from aiprod_core.model.text_connector import TextProjector
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder
from aiprod_core.model.vocoder import Vocoder
from aiprod_core.types import ScaleFactors

LTX2_SCALE = ScaleFactors(8, 32, 32)

# Theirs to ours, in this order; a name may hold several.
TRANSFORMER_NAMES = {
    "audio_prompt_adaln.": "audio_prompt_adaln_single.",
    "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
    "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
    "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
    "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "audio_time_embed.": "audio_adaln_single.",
    "audio_proj_in.": "audio_patchify_proj.",
    "time_embed.": "adaln_single.",
    "proj_in.": "patchify_proj.",
    ".norm_q.": ".q_norm.",
    ".norm_k.": ".k_norm.",
}
VOCODER_NAMES = {
    "conv_in.": "conv_pre.",
    "upsamplers.": "ups.",
    "resnets.": "resblocks.",
    "conv_out.": "conv_post.",
    "act_out.": "act_post.",
    "downsample.filter": "downsample.lowpass.filter",
}
CONNECTOR_NAMES = {
    "audio_text_proj_in": "feature_extractor.audio_aggregate_embed",
    "video_text_proj_in": "feature_extractor.video_aggregate_embed",
    "text_proj_in": "feature_extractor.aggregate_embed",
    ".transformer_blocks": ".transformer_1d_blocks",
    "attn1.norm_q": "attn1.q_norm",
    "attn1.norm_k": "attn1.k_norm",
}

# Their VAE blocks hold residual layers and what shrinks or grows them; ours are two of a list.
Rule = tuple[str, Callable[[re.Match[str]], str]]
DECODER_RULES: tuple[Rule, ...] = (
    (r"^mid_block\.resnets\.", lambda m: "up_blocks.0.res_blocks."),
    (r"^mid_block\.time_embedder\.", lambda m: "up_blocks.0.time_embedder."),
    (r"^up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up_blocks.{2 * int(m[1]) + 1}."),
    (r"^up_blocks\.(\d+)\.resnets\.", lambda m: f"up_blocks.{2 * int(m[1]) + 2}.res_blocks."),
    (r"^up_blocks\.(\d+)\.time_emb", lambda m: f"up_blocks.{2 * int(m[1]) + 2}.time_emb"),
    (r"^time_embedder\.", lambda m: "last_time_embedder."),
    (r"^scale_shift_table$", lambda m: "last_scale_shift_table"),
)


def encoder_rules(num_down_blocks: int) -> tuple[Rule, ...]:
    return (
        (r"^down_blocks\.(\d+)\.resnets\.", lambda m: f"down_blocks.{2 * int(m[1])}.res_blocks."),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.", lambda m: f"down_blocks.{2 * int(m[1]) + 1}."),
        (r"^mid_block\.resnets\.", lambda m: f"down_blocks.{2 * num_down_blocks}.res_blocks."),
    )


def transformer_name(name: str) -> str:
    """Our name of their parameter."""
    name = replaced(name, TRANSFORMER_NAMES)
    if name.startswith("prompt_adaln."):
        return name.replace("prompt_adaln.", "prompt_adaln_single.")
    return name


def replaced(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def ruled(name: str, rules: tuple[Rule, ...]) -> str:
    for pattern, replacement in rules:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def transformer_arguments(config: TransformerConfig) -> dict[str, Any]:
    limits = config.positional_embedding_max_pos
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "cross_attention_dim": config.cross_attention_dim,
        "pos_embed_max_pos": limits[0],
        "base_height": limits[1],
        "base_width": limits[2],
        "audio_in_channels": config.audio_in_channels,
        "audio_out_channels": config.audio_out_channels,
        "audio_num_attention_heads": config.audio_num_attention_heads,
        "audio_attention_head_dim": config.audio_attention_head_dim,
        "audio_cross_attention_dim": config.audio_cross_attention_dim,
        "audio_pos_embed_max_pos": config.audio_positional_embedding_max_pos[0],
        "gated_attn": config.apply_gated_attention,
        "audio_gated_attn": config.apply_gated_attention,
        "cross_attn_mod": config.cross_attention_adaln,
        "audio_cross_attn_mod": config.cross_attention_adaln,
        "num_layers": config.num_layers,
        "caption_channels": config.caption_channels or 1,
        "use_prompt_embeddings": config.caption_channels is not None,
        "rope_type": config.rope_type,
        "rope_theta": config.positional_embedding_theta,
        "rope_double_precision": config.frequencies_precision == "float64",
        "cross_attn_timestep_scale_multiplier": config.av_ca_timestep_scale_multiplier,
        "ff_bias": config.ff_bias,
        "audio_ff_bias": config.audio_ff_bias,
        "use_prompt_adaln_single": config.use_prompt_adaln_single,
        "use_keyframes_abs_pos_embedding": config.use_keyframes_abs_pos_embedding,
        "perturbed_attn": True,
    }


def transformer_peer(ours: Transformer, scale: ScaleFactors = LTX2_SCALE) -> nn.Module:
    """`scale` is that of the video VAE, by which theirs computes positions."""
    from diffusers import LTX2VideoTransformer3DModel

    theirs = LTX2VideoTransformer3DModel(
        **transformer_arguments(ours.config), vae_scale_factors=tuple(scale)
    )
    return _filled(theirs, ours.state_dict(), transformer_name)


def text_connectors_peer(ours: TextProjector, hidden_size: int, num_states: int) -> nn.Module:
    """Of 2.3's style or 2.0's, for a language model of that width and number of states."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    video, audio = ours.video_connector.config, ours.audio_connector.config
    has_own = ours.feature_extractor.has_own_projections
    theirs = LTX2TextConnectors(
        caption_channels=hidden_size,
        text_proj_in_factor=num_states,
        video_connector_num_attention_heads=video.heads,
        video_connector_attention_head_dim=video.head_dim,
        video_connector_num_layers=video.num_layers,
        video_connector_num_learnable_registers=video.num_registers,
        video_gated_attn=video.is_gated,
        audio_connector_num_attention_heads=audio.heads,
        audio_connector_attention_head_dim=audio.head_dim,
        audio_connector_num_layers=audio.num_layers,
        audio_connector_num_learnable_registers=audio.num_registers,
        audio_gated_attn=audio.is_gated,
        connector_rope_base_seq_len=video.max_position,
        rope_theta=video.theta,
        rope_double_precision=video.frequencies_in_float64,
        rope_type="interleaved" if video.is_interleaved else "split",
        per_modality_projections=has_own,
        video_hidden_dim=video.width,
        audio_hidden_dim=audio.width,
        proj_bias=has_own,
    )
    return _filled(theirs, ours.state_dict(), lambda name: replaced(name, CONNECTOR_NAMES))


def video_vae_peer(encoder: VideoEncoder | None, decoder: VideoDecoder) -> Any:
    """For block lists that alternate residual groups and resamplers, as published ones do.

    Without an encoder theirs is random; theirs is as wide at the pixels as the latent.
    """
    from diffusers import AutoencoderKLLTX2Video

    config = decoder.config
    axes = {"time": "temporal", "space": "spatial", "all": "spatiotemporal"}
    down, up = config.encoder_blocks[1::2], config.decoder_blocks[1::2]  # pixel side first
    theirs = AutoencoderKLLTX2Video(
        latent_channels=config.latent_channels,
        block_out_channels=_widths(config.encoder_base_channels, down),
        down_block_types=("LTX2VideoDownBlock3D",) * len(down),
        layers_per_block=tuple(block.num_layers for block in config.encoder_blocks[0::2]),
        spatio_temporal_scaling=(True,) * len(down),
        downsample_type=tuple(axes[block.name.split("_")[1]] for block in down),
        decoder_block_out_channels=_widths(config.decoder_base_channels, up),
        decoder_layers_per_block=tuple(block.num_layers for block in config.decoder_blocks[0::2]),
        decoder_spatio_temporal_scaling=(True,) * len(up),
        decoder_inject_noise=(False,) * (len(up) + 1),
        # The one list that they do not turn round before they run along it.
        upsample_type=tuple(axes[block.name.split("_")[1]] for block in reversed(up)),
        upsample_residual=tuple(block.residual for block in up),
        upsample_factor=tuple(block.multiplier for block in up),
        patch_size=config.patch_size,
        decoder_causal=config.causal_decoder,
        encoder_spatial_padding_mode=config.encoder_padding_mode,
        decoder_spatial_padding_mode=config.decoder_padding_mode,
        timestep_conditioning=config.timestep_conditioning,
    )
    if encoder is not None:
        rules = encoder_rules(len(down))
        _filled(theirs.encoder, encoder.state_dict(), lambda name: ruled(name, rules))
    _filled(theirs.decoder, decoder.state_dict(), lambda name: ruled(name, DECODER_RULES))
    _set_statistics(theirs, decoder.per_channel_statistics)
    return theirs.eval()


def _widths(base: int, blocks: Sequence[VAEBlock]) -> tuple[int, ...]:
    """Channels on the latent side of each resampler, pixel side first."""
    return tuple(accumulate((b.multiplier for b in blocks), operator.mul, initial=base))[1:]


def _set_statistics(theirs: Any, statistics: nn.Module) -> None:
    theirs.latents_mean.copy_(statistics.get_buffer("mean-of-means"))
    theirs.latents_std.copy_(statistics.get_buffer("std-of-means"))


def audio_vae_peer(decoder: AudioDecoder) -> Any:
    """Its decoder only; the encoder is random."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio

    config = decoder.config
    theirs = AutoencoderKLLTX2Audio(
        base_channels=config.base_channels,
        ch_mult=config.channel_multipliers,
        num_res_blocks=config.num_res_blocks,
        latent_channels=config.z_channels,
        mel_bins=config.mel_bins,
        causality_axis=config.causality_axis,
        mid_block_add_attention=config.mid_block_add_attention,
        attn_resolutions=config.attn_resolutions,
    )
    _filled(theirs.decoder, decoder.state_dict(), lambda name: name)
    _set_statistics(theirs, decoder.per_channel_statistics)
    return theirs.eval()


def vocoder_peer(ours: Vocoder) -> nn.Module:
    """Of a plain vocoder."""
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    config = ours.config.generator
    theirs = LTX2Vocoder(
        in_channels=config.channels * config.num_mels,
        hidden_channels=config.upsample_initial_channel,
        upsample_kernel_sizes=list(config.upsample_kernel_sizes),
        upsample_factors=list(config.upsample_rates),
        resnet_kernel_sizes=list(config.resblock_kernel_sizes),
        resnet_dilations=[list(rounds) for rounds in config.resblock_dilation_sizes],
        output_sampling_rate=ours.output_sample_rate,
    )
    return _filled(theirs, ours.state_dict(), lambda name: replaced(name, VOCODER_NAMES))


def _filled(theirs: nn.Module, weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> Any:
    theirs.load_state_dict({name: weights[rename(name)] for name in theirs.state_dict()})
    return theirs.eval().requires_grad_(False)
