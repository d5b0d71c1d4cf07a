"""A tiny random model in LTX-2.3's format, with its text encoder beside it: what the tests run."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import save_checkpoint
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.upsampler import LatentUpsampler, UpsamplerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_core.model.vocoder import GeneratorConfig, Vocoder, VocoderConfig
from aiprod_pipelines import media

WORDS = "a red blue ball bounces on the grey floor with loud soft sound rain".split()  # noqa: SIM905

# The video codec covers 4 frames and 8x8 pixels a latent.
VAE = {
    "latent_channels": 8,
    "patch_size": 2,
    "encoder_base_channels": 8,
    "decoder_base_channels": 8,
    "timestep_conditioning": False,
    "encoder_blocks": [
        ["compress_all_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 1}],
    ],
    "decoder_blocks": [
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["compress_all", {"residual": False, "multiplier": 1}],
    ],
    "spatial_padding_mode": "zeros",
}

TRANSFORMER = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "cross_attention_dim": 24,
    "audio_cross_attention_dim": 16,
    "in_channels": 8,
    "out_channels": 8,
    "audio_in_channels": 32,
    "audio_out_channels": 32,
    "av_ca_timestep_scale_multiplier": 1000,
    "frequencies_precision": "float64",
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 12,
    "connector_num_layers": 1,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
    "connector_positional_embedding_max_pos": [16],
    "connector_num_learnable_registers": 16,
}

GENERATION = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "frame_rate": 12,
    "num_inference_steps": 4,
    "cfg_scale": {"video": 3.0, "audio": 2.0},
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "rescale_scale": 0.0,
    "negative_prompt": "",
    "image_crf": 0,
}


def save_tiny_model(folder: Path) -> Path:
    """Writes `tiny-dev.safetensors` and `text_encoder/` and returns the model's path."""
    torch.manual_seed(0)
    save_tiny_text_encoder(folder / "text_encoder")
    audio = AudioVAEConfig(
        base_channels=8, channel_multipliers=(1, 1, 1), num_res_blocks=1, z_channels=2
    )
    vocoder = VocoderConfig(
        GeneratorConfig(
            upsample_rates=(10, 16),
            upsample_kernel_sizes=(20, 32),
            upsample_initial_channel=16,
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3),),
        ),
        generator_sampling_rate=16000,
    )
    video = VideoVAEConfig.from_metadata(VAE)
    text = TextConfig.from_metadata(TRANSFORMER, hidden_size=8, num_states=3)
    modules = [
        (key_maps.TRANSFORMER, Transformer(TransformerConfig.from_metadata(TRANSFORMER))),
        (key_maps.TEXT_PROJECTOR, TextProjector(text)),
        (key_maps.VIDEO_ENCODER, VideoEncoder(video)),
        (key_maps.VIDEO_DECODER, VideoDecoder(video)),
        (key_maps.AUDIO_ENCODER, AudioEncoder(audio)),
        (key_maps.AUDIO_DECODER, AudioDecoder(audio)),
        (key_maps.VOCODER, Vocoder(vocoder)),
    ]
    for _, module in modules:
        for name, parameter in module.named_parameters():
            if "per_channel_statistics" not in name and parameter.ndim < 2:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    config = {
        "transformer": TRANSFORMER,
        "vae": VAE,
        "audio_vae": audio.to_metadata(),
        "vocoder": vocoder.to_metadata(),
        "text_encoder": {"type": "minilm", "max_length": 16},
    }
    metadata = {"config": config, "model_version": "2.3.0", "generation": GENERATION}
    path = folder / "tiny-dev.safetensors"
    save_checkpoint(path, modules, metadata)
    return path


def save_tiny_text_encoder(folder: Path) -> None:
    """A random BERT of 2 layers and width 8 over a handful of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertModel

    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    config.to_json_file(folder / "config.json")
    model = BertModel(config, add_pooling_layer=False)
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_tiny_upsampler(path: Path, **changes: object) -> None:
    torch.manual_seed(1)
    config = UpsamplerConfig(in_channels=8, mid_channels=32, num_blocks_per_stage=1)
    config = replace(config, **changes)
    metadata = {"config": config.to_metadata()}
    save_checkpoint(path, [(key_maps.UPSAMPLER, LatentUpsampler(config))], metadata)


def save_tiny_lora(
    path: Path, *, layer: str = "transformer_blocks.0.attn1.to_q", width: int = 24, **metadata: str
) -> None:
    """Rank 2, for one layer of the tiny transformer, which is 24 wide."""
    torch.manual_seed(2)
    name = f"diffusion_model.{layer}"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, width),
        f"{name}.lora_B.weight": torch.randn(width, 2),
    }
    save_file(tensors, path, metadata={"format": "pt", **metadata})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees what another or the user has kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AIPROD_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, its distilled sibling and all that belongs beside them."""
    folder = tmp_path_factory.mktemp("family")
    model = save_tiny_model(folder)
    shutil.copy(model, folder / "tiny-distilled.safetensors")
    save_tiny_upsampler(folder / "tiny-spatial-upscaler-x2-1.0.safetensors")
    save_tiny_lora(folder / "tiny-distilled-lora-2.safetensors")
    save_tiny_lora(
        folder / "tiny-ic-lora-canny-control.safetensors", reference_downscale_factor="2"
    )
    save_tiny_lora(folder / "tiny-lora-camera-control-jib-up.safetensors")
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    y, x = np.mgrid[:48, :72]
    pixels = np.stack([x * 3, y * 5, 255 - x * 2], -1).astype(np.uint8)
    path = tmp_path_factory.mktemp("picture") / "first.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def source_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 frames of 52x36 at 12 a second, with a tone: off the tiny model's grid in every way."""
    t, y, x = np.mgrid[:18, :36, :52]
    frames = np.stack([x * 4, y * 5, t * 12], -1).astype(np.uint8)
    path = tmp_path_factory.mktemp("source") / "source.mp4"
    media.write_video(path, [frames], 12, audio=tone(1.5))
    return path


@pytest.fixture(scope="session")
def save_lora():
    return save_tiny_lora


@pytest.fixture(scope="session")
def save_upsampler():
    return save_tiny_upsampler


@pytest.fixture(scope="session")
def make_tone():
    return tone


def tone(duration_s: float, sample_rate: int = 16000) -> media.Audio:
    times = np.arange(round(duration_s * sample_rate)) / sample_rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * times).astype(np.float32)
    return media.Audio(np.stack([wave, -wave]), sample_rate)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))
