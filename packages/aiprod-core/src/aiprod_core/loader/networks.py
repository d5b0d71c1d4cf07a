"""From a checkpoint to a ready network, one function per component.

Each reads its section of the header's config, builds the network and fills it. `dtype` None keeps
the file's own precision.
"""

import re
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, load_module
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.duration_head import DurationHead, DurationHeadConfig
from aiprod_core.model.reward import RewardConfig, RewardModel
from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.text_encoder import GEMMA_HUB_ID, GemmaEncoder, MiniLMEncoder, TextEncoder
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.upsampler import LatentUpsampler, UpsamplerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_core.model.vocoder import Vocoder, VocoderConfig
from aiprod_core.quantization.fp8 import adopt_fp8_weights
from aiprod_core.quantization.schemes import storing

# What a network for sound alone reads of a joint file.
AUDIO_PARTS = (
    "audio_attn1",
    "audio_attn2",
    "audio_ff",
    "audio_patchify",
    "audio_proj_out",
    "audio_adaln_single",
    "audio_prompt",
    "audio_scale_shift_table",
    "audio_caption_projection",
)
# What a network for the picture alone does not read.
SOUND_PARTS = ("audio", "a2v", "v2a", "av_ca")
SCALES = (".weight_scale", ".input_scale")


def load_transformer(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    audio_only: bool = False,
    video_only: bool = False,
    quantization: str | None = None,
    leaves_blocks: bool = False,
    left: Container[str] = (),
) -> Transformer:
    """The transformer without its text connectors, or one half of a joint one.

    Weights that the file holds in fp8 stay so, in layers of `quantization.fp8`. `quantization`
    names one of `quantization.schemes`, applied weight by weight as they are read. With
    `leaves_blocks` the blocks' weights stay in the file, on the meta device, for
    `offload.stream_from_file`; weights whose names are in `left` are left there too, for
    `lora.put_fused`. Raises InputError for a file that cannot be had in that way.
    """
    if quantization is not None and checkpoint.is_fp8:
        kept = "fp8-scaled-mm" if _has_input_scales(checkpoint) else "fp8"
        if quantization != kept:
            raise InputError(
                f"{checkpoint.name} is quantised already ({kept}) and cannot become "
                f"{quantization}; leave out --quantization, or give the bf16 file."
            )
        quantization = None
    if leaves_blocks and (
        quantization is not None
        or (_has_weight_scales(checkpoint) and not _has_input_scales(checkpoint))
    ):
        raise InputError(
            f"{checkpoint.name}: weights cannot be quantised and streamed from the file at once; "
            "run aiprod models convert, and give the file that it writes."
        )
    config = TransformerConfig.from_metadata(checkpoint.section("transformer"))
    if audio_only:
        config = replace(config, has_video=False)
    if video_only:
        config = replace(config, has_audio=False)
    transformer = load_module(
        checkpoint,
        key_maps.TRANSFORMER,
        lambda: Transformer(config),
        dtype=dtype,
        device=device,
        keep=lambda name: (
            not name.endswith(SCALES)
            and (not audio_only or any(part in name for part in AUDIO_PARTS))
            and (not video_only or not any(part in name for part in SOUND_PARTS))
        ),
        is_left=lambda name: (
            name in left or (leaves_blocks and name.startswith("transformer_blocks."))
        ),
        store=None if quantization is None else storing(quantization),
    )
    if checkpoint.is_fp8:
        keys = [key for key in checkpoint.tensors if key.endswith(SCALES)]
        names = {key: key_maps.TRANSFORMER.rename(key) for key in keys}
        scales = checkpoint.read((key for key in keys if names[key] is not None), device)
        adopt_fp8_weights(
            transformer,
            {str(names[key]): scale for key, scale in scales.items()},
            dtype or torch.bfloat16,
        )
    return transformer


def _has_weight_scales(checkpoint: Checkpoint) -> bool:
    return any(key.endswith(".weight_scale") for key in checkpoint.tensors)


def _has_input_scales(checkpoint: Checkpoint) -> bool:
    return any(key.endswith(".input_scale") for key in checkpoint.tensors)


def load_video_encoder(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VideoEncoder:
    config = VideoVAEConfig.from_metadata(checkpoint.section("vae"))
    for key, info in checkpoint.tensors.items():
        # Published encoders start `latent_channels` wide whatever encoder_base_channels says.
        if key_maps.VIDEO_ENCODER.rename(key) == "conv_in.conv.bias":
            config = replace(config, encoder_base_channels=info.shape[0])
    return load_module(
        checkpoint,
        key_maps.VIDEO_ENCODER,
        lambda: VideoEncoder(config),
        dtype=dtype,
        device=device,
    )


def load_video_decoder(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VideoDecoder:
    config = VideoVAEConfig.from_metadata(checkpoint.section("vae"))
    return load_module(
        checkpoint,
        key_maps.VIDEO_DECODER,
        lambda: VideoDecoder(config),
        dtype=dtype,
        device=device,
    )


def load_upsampler(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LatentUpsampler:
    """An upsampler has a file of its own, whose config is flat: it has no sections."""
    config = UpsamplerConfig.from_metadata(checkpoint.config)
    return load_module(
        checkpoint,
        key_maps.UPSAMPLER,
        lambda: LatentUpsampler(config),
        dtype=dtype,
        device=device,
    )


def load_audio_encoder(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AudioEncoder:
    config = AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
    return load_module(
        checkpoint,
        key_maps.AUDIO_ENCODER,
        lambda: AudioEncoder(config),
        dtype=dtype,
        device=device,
    )


def load_audio_decoder(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AudioDecoder:
    config = AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
    return load_module(
        checkpoint,
        key_maps.AUDIO_DECODER,
        lambda: AudioDecoder(config),
        dtype=dtype,
        device=device,
    )


def load_vocoder(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Vocoder:
    """Either kind of vocoder. One with bandwidth extension is float32 whatever `dtype` says."""
    config = VocoderConfig.from_metadata(checkpoint.section("vocoder"))
    return load_module(
        checkpoint,
        key_maps.VOCODER,
        lambda: Vocoder(config),
        dtype=torch.float32 if config.bwe else dtype,
        device=device,
    )


def check_text_encoder(
    checkpoint: Checkpoint, text_encoder_path: str | Path | None = None
) -> dict[str, Any]:
    """The config section that names the text encoder, once it is known to be usable.

    Reads headers only, so that nobody waits for gigabytes to learn what is missing. Raises
    InputError when a path must be given, CheckpointError for an encoder that is not supported.
    """
    section: dict[str, Any] = checkpoint.config.get("text_encoder") or {"type": "gemma3"}
    if section.get("type") not in ("gemma3", "minilm"):
        raise CheckpointError(
            f'{checkpoint.paths[0]}: text_encoder type "{section.get("type")}" is not supported; '
            "supported are gemma3 and minilm"
        )
    if section["type"] == "gemma3":
        _check_gemma_version(checkpoint)
        if text_encoder_path is None:
            raise InputError(
                f"{checkpoint.name} needs a text encoder: give --text-encoder FOLDER "
                f"or --text-encoder {GEMMA_HUB_ID}"
            )
    return section


def load_text_encoder(
    checkpoint: Checkpoint,
    text_encoder_path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """The language model that the checkpoint was trained with.

    The config section `text_encoder` names it: {"type": "minilm", "max_length": 64} is the one in
    `text_encoder/` beside the checkpoint; without a section it is Gemma 3, for which
    `text_encoder_path` (a folder or a hub id) must be given. Raises as `check_text_encoder`, and
    CheckpointError for an encoder of another size.
    """
    section = check_text_encoder(checkpoint, text_encoder_path)
    with _without_torchao():
        if section["type"] == "minilm":
            return MiniLMEncoder.load(
                text_encoder_path or checkpoint.paths[0].parent / "text_encoder",
                max_length=section.get("max_length", 64),
                device=device,
                dtype=dtype or torch.float32,
            )
        assert text_encoder_path is not None  # checked above
        return GemmaEncoder.load(
            text_encoder_path,
            max_length=section.get("max_length", 1024),
            num_features=_text_features(checkpoint),
            device=device,
            dtype=dtype or torch.bfloat16,
        )


@contextmanager
def _without_torchao() -> Iterator[None]:
    """Keeps transformers from importing torchao, which nothing here asks of it.

    Where torchao is installed for something else, its import takes seconds and prints warnings
    about kernels of other machines.
    """
    if "torchao" in sys.modules:
        yield
        return
    sys.modules["torchao"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["torchao"]


def load_text_projector(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> TextProjector:
    """Feature extractor and both connectors, of either generation."""
    config = TextConfig.from_metadata(checkpoint.section("transformer"))
    # The header's config lacks these sizes; without the tensors load_module names what is missing.
    config = config.resized(
        _text_features(checkpoint) or config.num_features,
        _registers(checkpoint, "video") or config.video.num_registers,
        _registers(checkpoint, "audio") or config.audio.num_registers,
    )
    return load_module(
        checkpoint,
        key_maps.TEXT_PROJECTOR,
        lambda: TextProjector(config),
        dtype=dtype,
        device=device,
    )


def load_duration_head(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> DurationHead:
    config = DurationHeadConfig.from_metadata(
        checkpoint.section("duration_head"), checkpoint.config.get("transformer") or {}
    )
    return load_module(
        checkpoint,
        key_maps.DURATION_HEAD,
        lambda: DurationHead(config),
        dtype=dtype,
        device=device,
    )


def load_reward(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> RewardModel:
    config = RewardConfig.from_metadata(checkpoint.section("reward"))
    return load_module(
        checkpoint, key_maps.REWARD, lambda: RewardModel(config), dtype=dtype, device=device
    )


def _check_gemma_version(checkpoint: Checkpoint) -> None:
    """Files from 2.5 on say which Gemma they were trained with."""
    source = checkpoint.metadata.get("gemma_source_checkpoint")
    if not isinstance(source, dict) or "gemma_version" not in source:
        return
    version = str(source["gemma_version"])
    if re.findall(r"\d+", version)[:1] != ["3"]:
        raise CheckpointError(
            f'{checkpoint.paths[0]}: gemma_version "{version}" is not supported; supported is 3'
        )


def _text_features(checkpoint: Checkpoint) -> int | None:
    """Features a token (D * L) that the projection takes; the config does not hold them."""
    for name in ("aggregate_embed", "video_aggregate_embed"):
        info = checkpoint.tensors.get(f"text_embedding_projection.{name}.weight")
        if info is not None and len(info.shape) == 2:
            return info.shape[1]
    return None


def _registers(checkpoint: Checkpoint, modality: str) -> int | None:
    key = f"model.diffusion_model.{modality}_embeddings_connector.learnable_registers"
    info = checkpoint.tensors.get(key)
    return info.shape[0] if info is not None else None
