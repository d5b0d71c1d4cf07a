"""Names and shapes of the released networks, built on the meta device from their header configs.

The sections are the released files' as far as they are known; what they leave out has its default.
"""

from typing import Any

import pytest
import torch

from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import KeyMap
from aiprod_core.model.transformer import FIXED, PROJECTED_TEXT, Transformer, TransformerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig

SECTION_19B: dict[str, Any] = {
    **FIXED,
    "_class_name": "AVTransformer3DModel",
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "in_channels": 128,
    "out_channels": 128,
    "num_layers": 48,
    "cross_attention_dim": 4096,
    "audio_cross_attention_dim": 2048,
    "caption_channels": 3840,
    "av_ca_timestep_scale_multiplier": 1000,
    "frequencies_precision": "float64",
    "connector_positional_embedding_max_pos": [4096],
}
SECTION_22B = {
    **SECTION_19B,
    **PROJECTED_TEXT,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
}
VAE_19B: dict[str, Any] = {
    "dims": 3,
    "latent_channels": 128,
    "patch_size": 4,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "causal_decoder": False,
    "timestep_conditioning": False,
    "encoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 5}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", {"num_layers": 5}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", {"num_layers": 5}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", {"num_layers": 5}],
    ],
}
VAE_22B = {
    **VAE_19B,
    "spatial_padding_mode": "zeros",
    "encoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 4}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time", {"multiplier": 2}],
        ["res_x", {"num_layers": 4}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}],
        ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
    ],
}
# Members of a block that both generations have, with the (out, in) of their matrices.
ATTENTION_SHAPES = {
    "attn1": ((4096, 4096), (4096, 4096), (4096, 4096), 4096),
    "attn2": ((4096, 4096), (4096, 4096), (4096, 4096), 4096),
    "audio_attn1": ((2048, 2048), (2048, 2048), (2048, 2048), 2048),
    "audio_attn2": ((2048, 2048), (2048, 2048), (2048, 2048), 2048),
    "audio_to_video_attn": ((2048, 4096), (2048, 2048), (4096, 2048), 2048),
    "video_to_audio_attn": ((2048, 2048), (2048, 4096), (2048, 2048), 2048),
}


def shapes(section: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig.from_metadata(section))
    return {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}


@pytest.fixture(scope="module")
def names_19b() -> dict[str, tuple[int, ...]]:
    return shapes(SECTION_19B)


@pytest.fixture(scope="module")
def names_22b() -> dict[str, tuple[int, ...]]:
    return shapes(SECTION_22B)


@pytest.mark.parametrize(("section", "billions"), [(SECTION_19B, 18.88), (SECTION_22B, 18.99)])
def test_the_transformers_have_their_published_number_of_parameters(
    section: dict[str, Any], billions: float
):
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig.from_metadata(section))
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    ("section", "encoder_billions", "decoder_billions"),
    [(VAE_19B, 0.69, 0.53), (VAE_22B, 0.32, 0.41)],
)
def test_the_video_vaes_have_their_published_number_of_parameters(
    section: dict[str, Any], encoder_billions: float, decoder_billions: float
):
    config = VideoVAEConfig.from_metadata(section)
    with torch.device("meta"):
        networks = VideoEncoder(config), VideoDecoder(config)
    assert networks[0].scale == (8, 32, 32)
    for network, billions in zip(networks, (encoder_billions, decoder_billions), strict=True):
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("generation", ["names_19b", "names_22b"])
def test_attention_layers_have_the_published_shapes(
    generation: str, request: pytest.FixtureRequest
):
    names = request.getfixturevalue(generation)
    for layer, (to_q, to_kv, to_out, norm) in ATTENTION_SHAPES.items():
        stem = f"transformer_blocks.47.{layer}."
        want: dict[str, tuple[int, ...]] = {
            "to_q.weight": to_q,
            "to_k.weight": to_kv,
            "to_v.weight": to_kv,
            "to_out.0.weight": to_out,
            "to_q.bias": to_q[:1],
            "to_k.bias": to_kv[:1],
            "to_v.bias": to_kv[:1],
            "to_out.0.bias": to_out[:1],
            "q_norm.weight": (norm,),
            "k_norm.weight": (norm,),
        }
        if generation == "names_22b":
            want |= {"to_gate_logits.weight": (32, to_q[1]), "to_gate_logits.bias": (32,)}
        found = {n.removeprefix(stem): s for n, s in names.items() if n.startswith(stem)}
        assert found == want


def test_a_block_of_the_19b_holds_nothing_else(names_19b: dict[str, tuple[int, ...]]):
    stem = "transformer_blocks.0."
    rest = {
        name.removeprefix(stem): shape
        for name, shape in names_19b.items()
        if name.startswith(stem) and "attn" not in name
    }
    assert rest == {
        "ff.net.0.proj.weight": (16384, 4096),
        "ff.net.0.proj.bias": (16384,),
        "ff.net.2.weight": (4096, 16384),
        "ff.net.2.bias": (4096,),
        "audio_ff.net.0.proj.weight": (8192, 2048),
        "audio_ff.net.0.proj.bias": (8192,),
        "audio_ff.net.2.weight": (2048, 8192),
        "audio_ff.net.2.bias": (2048,),
        "scale_shift_table": (6, 4096),
        "audio_scale_shift_table": (6, 2048),
        "scale_shift_table_a2v_ca_video": (5, 4096),
        "scale_shift_table_a2v_ca_audio": (5, 2048),
    }


def test_around_the_blocks_the_19b_has_these_names(names_19b: dict[str, tuple[int, ...]]):
    outside = {n: s for n, s in names_19b.items() if not n.startswith("transformer_blocks.")}
    want: dict[str, tuple[int, ...]] = {
        "scale_shift_table": (2, 4096),
        "audio_scale_shift_table": (2, 2048),
    }
    for name, out_width, in_width in (
        ("patchify_proj", 4096, 128),
        ("audio_patchify_proj", 2048, 128),
        ("proj_out", 128, 4096),
        ("audio_proj_out", 128, 2048),
        ("caption_projection.linear_1", 4096, 3840),
        ("caption_projection.linear_2", 4096, 4096),
        ("audio_caption_projection.linear_1", 2048, 3840),
        ("audio_caption_projection.linear_2", 2048, 2048),
    ):
        want |= {f"{name}.weight": (out_width, in_width), f"{name}.bias": (out_width,)}
    for name, width, rows in (
        ("adaln_single", 4096, 6),
        ("audio_adaln_single", 2048, 6),
        ("av_ca_video_scale_shift_adaln_single", 4096, 4),
        ("av_ca_a2v_gate_adaln_single", 4096, 1),
        ("av_ca_audio_scale_shift_adaln_single", 2048, 4),
        ("av_ca_v2a_gate_adaln_single", 2048, 1),
    ):
        for layer, out_width, in_width in (
            ("emb.timestep_embedder.linear_1", width, 256),
            ("emb.timestep_embedder.linear_2", width, width),
            ("linear", rows * width, width),
        ):
            want |= {
                f"{name}.{layer}.weight": (out_width, in_width),
                f"{name}.{layer}.bias": (out_width,),
            }
    assert outside == want


def test_the_22b_adds_gates_and_text_modulation_and_drops_the_caption_projection(
    names_19b: dict[str, tuple[int, ...]], names_22b: dict[str, tuple[int, ...]]
):
    def members(names: set[str]) -> set[str]:
        """With block indices and layer names of the same kind taken together."""
        return {n.split(".", 2)[2] if n.startswith("transformer_blocks.") else n for n in names}

    added = members(names_22b.keys() - names_19b.keys())
    assert {n for n in added if "to_gate_logits" in n} == {
        f"{layer}.to_gate_logits.{leaf}"
        for layer in ATTENTION_SHAPES
        for leaf in ("weight", "bias")
    }
    rest = {n for n in added if "to_gate_logits" not in n}
    assert {n.split(".")[0] for n in rest} == {
        "prompt_scale_shift_table",
        "audio_prompt_scale_shift_table",
        "prompt_adaln_single",
        "audio_prompt_adaln_single",
    }
    removed = names_19b.keys() - names_22b.keys()
    assert {n.split(".")[0] for n in removed} == {"caption_projection", "audio_caption_projection"}
    assert names_22b["adaln_single.linear.weight"] == (9 * 4096, 4096)
    assert names_22b["audio_prompt_adaln_single.linear.weight"] == (2 * 2048, 2048)
    assert names_22b["transformer_blocks.5.prompt_scale_shift_table"] == (2, 4096)
    assert names_22b["transformer_blocks.5.audio_scale_shift_table"] == (9, 2048)


def test_later_options_change_these_names_only(names_22b: dict[str, tuple[int, ...]]):
    later = shapes(
        SECTION_22B
        | {
            "ff_bias": False,
            "use_prompt_adaln_single": False,
            "use_keyframes_abs_pos_embedding": True,
        }
    )
    assert later.keys() - names_22b.keys() == {"keyframes_abs_pos_embedding"}
    assert later["keyframes_abs_pos_embedding"] == (1, 4096)
    removed = names_22b.keys() - later.keys()
    assert all(".ff.net." in n or "prompt_adaln_single." in n for n in removed)
    assert sum(".ff.net." in n for n in removed) == 2 * 48


def test_an_audio_only_network_has_only_names_that_audio_files_keep():
    with torch.device("meta"):
        config = TransformerConfig.from_metadata(SECTION_22B | {"has_video": False})
        names = Transformer(config).state_dict()
    parts = (
        "audio_attn1",
        "audio_attn2",
        "audio_ff",
        "audio_patchify",
        "audio_proj_out",
        "audio_adaln_single",
        "audio_prompt",
        "audio_scale_shift_table",
    )
    assert all(any(part in name for part in parts) for name in names)
    assert not any("video" in name or "av_ca" in name for name in names)


@pytest.mark.parametrize(
    ("key_map", "key", "name"),
    [
        (key_maps.TRANSFORMER, "model.diffusion_model.proj_out.weight", "proj_out.weight"),
        (
            key_maps.TRANSFORMER,
            "model.diffusion_model.video_embeddings_connector.learnable_registers",
            None,
        ),
        (key_maps.VOCODER, "vocoder.vocoder.conv_pre.weight", "vocoder.conv_pre.weight"),
        (key_maps.VIDEO_DECODER, "vae.decoder.conv_in.conv.weight", "conv_in.conv.weight"),
        (key_maps.VIDEO_DECODER, "vae.per_channel_statistics.mean-of-stds", None),
        (key_maps.VIDEO_DECODER, "vae.encoder.conv_in.conv.weight", None),
        (
            key_maps.TEXT_PROJECTOR,
            "text_embedding_projection.aggregate_embed.weight",
            "feature_extractor.aggregate_embed.weight",
        ),
    ],
)
def test_prefixes_tell_the_components_of_a_file_apart(key_map: KeyMap, key: str, name: str | None):
    assert key_map.rename(key) == name
    if name is not None:
        assert key_map.publish(name) == key
