"""A tiny random model in LTX-2.3's format, with its text encoder beside it: what the tests run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import save_checkpoint
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_core.model.vocoder import GeneratorConfig, Vocoder, VocoderConfig

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))
