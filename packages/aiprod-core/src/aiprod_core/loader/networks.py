"""From a checkpoint to a ready network, one function per component.

Each reads its section of the header's config, builds the network and fills it. `dtype` None keeps
the file's own precision.
"""

import torch

from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, load_module
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.vocoder import Vocoder, VocoderConfig


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
