import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_text_encoder, load_text_projector
from aiprod_core.model.text_connector import (
    TextConfig,
    TextProjector,
    scale_by_range,
    scale_by_rms,
)
from aiprod_core.model.transformer import PROJECTED_TEXT

HIDDEN_SIZE, NUM_STATES, LENGTH = 6, 3, 16

SECTION_2_0 = {
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 8,
    "connector_num_layers": 2,
    "connector_num_learnable_registers": 8,
    "connector_positional_embedding_max_pos": [64],
}
SECTION_2_3 = {
    **SECTION_2_0,
    **PROJECTED_TEXT,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 4,
    "audio_connector_num_layers": 1,
    "connector_apply_gated_attention": True,
    "frequencies_precision": "float64",
}
STYLES = pytest.mark.parametrize("section", [SECTION_2_0, SECTION_2_3], ids=["2.0", "2.3"])


def projector_for(section):
    torch.manual_seed(0)
    projector = TextProjector(TextConfig.from_metadata(section, HIDDEN_SIZE, NUM_STATES)).eval()
    for parameter in projector.parameters():  # large enough that every part matters
        torch.nn.init.normal_(parameter, std=0.4)
    return projector


def text_of(num_tokens, side, padding=0.0):
    """Hidden states (1, S, D, L) with the same tokens whatever the padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, num_tokens, HIDDEN_SIZE, NUM_STATES, generator=generator)
    rest = torch.full((1, LENGTH - num_tokens, HIDDEN_SIZE, NUM_STATES), padding)
    ones, zeros = torch.ones(1, num_tokens), torch.zeros(1, LENGTH - num_tokens)
    states, mask = (
        ([rest, tokens], [zeros, ones])
        if side == "left"
        else (
            [tokens, rest],
            [ones, zeros],
        )
    )
    return torch.cat(states, dim=1), torch.cat(mask, dim=1).long()


@STYLES
def test_left_and_right_padding_give_the_same_contexts(section):
    projector = projector_for(section)
    left = projector(*text_of(5, "left"))
    right = projector(*text_of(5, "right"))
    for got, want in zip(left, right, strict=True):
        torch.testing.assert_close(got, want)


@STYLES
@pytest.mark.parametrize("padding", [1e6, float("nan")])
def test_what_lies_in_the_padding_never_reaches_a_context(section, padding):
    projector = projector_for(section)
    clean = projector(*text_of(5, "left"))
    dirty = projector(*text_of(5, "left", padding))
    for got, want in zip(dirty, clean, strict=True):
        torch.testing.assert_close(got, want)


@STYLES
def test_texts_of_a_batch_do_not_mix(section):
    projector = projector_for(section)
    first, second = text_of(5, "left"), text_of(9, "right")
    together = projector(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    for i, text in enumerate((first, second)):
        for got, want in zip(together, projector(*text), strict=True):
            torch.testing.assert_close(got[i : i + 1], want)


@STYLES
def test_contexts_have_the_connectors_widths_and_a_mask_of_ones(section):
    video, audio, mask = projector_for(section)(*text_of(5, "left"))
    assert video.shape == (1, LENGTH, 16)
    assert audio.shape == (1, LENGTH, 8 if section is SECTION_2_3 else 16)
    assert mask.tolist() == [[1] * LENGTH]


def test_registers_fill_the_rest_by_absolute_position_and_repeat():
    connector = projector_for(SECTION_2_0).video_connector
    connector.transformer_1d_blocks = torch.nn.ModuleList()  # what the blocks would be given
    x = torch.randn(1, LENGTH, 16)
    filled = connector(x, (torch.arange(LENGTH) < 3)[None])
    registers = connector.learnable_registers.repeat(2, 1)
    want = torch.cat((x[0, :3], registers[3:]))
    want = want / (want.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(filled[0], want)


def test_a_full_text_uses_no_register():
    projector = projector_for(SECTION_2_3)
    video, _, _ = projector(*text_of(LENGTH, "left"))
    with torch.no_grad():
        projector.video_connector.learnable_registers += 1
    torch.testing.assert_close(projector(*text_of(LENGTH, "left"))[0], video)


def test_the_order_of_tokens_matters():
    projector = projector_for(SECTION_2_3)
    states, mask = text_of(LENGTH, "left")
    video, _, _ = projector(states, mask)
    flipped, _, _ = projector(states.flip(1), mask)
    assert (flipped.flip(1) - video).abs().max() > 1e-2


@STYLES
def test_every_parameter_of_a_new_projector_gets_a_gradient(section):
    torch.manual_seed(0)
    projector = TextProjector(TextConfig.from_metadata(section, HIDDEN_SIZE, NUM_STATES))
    video, audio, _ = projector(*text_of(5, "left"))
    (video[0, 0, 0] + audio[0, 0, 0]).backward()
    silent = [
        name
        for name, parameter in projector.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert silent == []


def test_range_scaling_maps_each_layers_values_to_a_width_of_eight_around_zero():
    states, mask = text_of(5, "right", padding=100.0)
    scaled = scale_by_range(states, mask).unflatten(-1, (HIDDEN_SIZE, NUM_STATES))
    for layer in range(NUM_STATES):
        values = scaled[0, :5, :, layer]
        assert values.max() - values.min() == pytest.approx(8, abs=1e-4)
        assert values.mean() == pytest.approx(0, abs=1e-5)
    assert (scaled[0, 5:] == 0).all()


def test_rms_scaling_gives_each_token_and_layer_unit_size():
    states, mask = text_of(5, "right", padding=100.0)
    scaled = scale_by_rms(states, mask).unflatten(-1, (HIDDEN_SIZE, NUM_STATES))
    rms = scaled[0, :5].square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-4, rtol=0)
    assert (scaled[0, 5:] == 0).all()


def test_a_length_off_the_registers_names_the_next_one():
    states, mask = text_of(5, "left")
    with pytest.raises(InputError, match="multiple of the 8 registers; pad it to 16"):
        projector_for(SECTION_2_0)(states[:, :12], mask[:, :12])


def test_states_of_another_encoder_are_refused():
    states, mask = text_of(5, "left")
    with pytest.raises(InputError, match="2 hidden states of width 6, 12 features"):
        projector_for(SECTION_2_0)(states[..., :2], mask)


def test_the_audio_connector_falls_back_to_the_common_keys():
    config = TextConfig.from_metadata(SECTION_2_0, HIDDEN_SIZE, NUM_STATES)
    assert config.audio == config.video
    config = TextConfig.from_metadata(SECTION_2_3, HIDDEN_SIZE, NUM_STATES)
    assert (config.audio.width, config.audio.num_layers) == (8, 1)
    assert replace(config.audio, head_dim=8, num_layers=2) == config.video


@STYLES
def test_a_config_survives_the_way_through_metadata(section):
    config = TextConfig.from_metadata(section, HIDDEN_SIZE, NUM_STATES)
    metadata = json.loads(json.dumps(config.to_metadata()))
    assert TextConfig.from_metadata(metadata, HIDDEN_SIZE, NUM_STATES) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "spiral"}, "rope_type is 'spiral'"),
        ({"frequencies_precision": "float16"}, "frequencies_precision is 'float16'"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"connector_positional_embedding_max_pos": [1, 2]}, r"max_pos is \[1, 2\]"),
        ({"caption_proj_input_norm": True}, "caption_proj_input_norm is True"),
    ],
)
def test_unsupported_values_are_refused_by_key_and_value(change, message):
    with pytest.raises(CheckpointError, match=message):
        TextConfig.from_metadata({**SECTION_2_3, **change}, HIDDEN_SIZE, NUM_STATES)


def test_connectors_that_share_features_must_be_equally_wide():
    with pytest.raises(CheckpointError, match=r"is 8 and the video connector's 16"):
        TextConfig.from_metadata({**SECTION_2_0, "audio_connector_attention_head_dim": 4})


def test_a_projection_between_the_generations_is_refused():
    section = {k: v for k, v in SECTION_2_3.items() if k != "caption_proj_input_norm"}
    with pytest.raises(CheckpointError, match="without caption_proj_input_norm"):
        TextConfig.from_metadata(section, HIDDEN_SIZE, NUM_STATES)


def write_checkpoint(path, projector, config):
    names = {
        "feature_extractor.": "text_embedding_projection.",
        "video_connector.": "model.diffusion_model.video_embeddings_connector.",
        "audio_connector.": "model.diffusion_model.audio_embeddings_connector.",
    }
    tensors = {}
    for name, tensor in projector.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        tensors[names[ours] + name[len(ours) :]] = tensor.contiguous()
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    return open_checkpoint(path)


@STYLES
def test_a_published_file_gives_its_sizes_by_the_shapes_of_its_tensors(section, tmp_path):
    projector = projector_for(section)
    section = {k: v for k, v in section.items() if k != "connector_num_learnable_registers"}
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", projector, {"transformer": section})
    loaded = load_text_projector(checkpoint)
    for got, want in zip(loaded(*text_of(5, "left")), projector(*text_of(5, "left")), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("section", "extractor", "video", "audio"),
    [
        ({}, 0.72e9, 0.35e9, 0.35e9),
        (
            {
                **PROJECTED_TEXT,
                "connector_num_attention_heads": 32,
                "connector_num_layers": 8,
                "audio_connector_num_attention_heads": 32,
                "audio_connector_attention_head_dim": 64,
                "connector_apply_gated_attention": True,
            },
            1.16e9,
            1.61e9,
            0.40e9,
        ),
    ],
    ids=["2.0", "2.3"],
)
def test_published_configs_give_the_published_parameter_counts(section, extractor, video, audio):
    with torch.device("meta"):
        projector = TextProjector(TextConfig.from_metadata(section))
    for part, count in (
        (projector.feature_extractor, extractor),
        (projector.video_connector, video),
        (projector.audio_connector, audio),
    ):
        found = sum(parameter.numel() for parameter in part.parameters())
        assert found == pytest.approx(count, abs=0.006e9)  # published to two decimals


def test_a_file_without_the_projection_names_the_tensors_it_lacks(tmp_path):
    path = tmp_path / "m.safetensors"
    config = {"config": json.dumps({"transformer": SECTION_2_0})}
    save_file({"other": torch.zeros(1)}, path, metadata=config)
    with pytest.raises(CheckpointError, match=r"feature_extractor\.aggregate_embed\.weight"):
        load_text_projector(open_checkpoint(path))


@pytest.mark.parametrize(
    ("config", "metadata", "message"),
    [
        ({}, {}, r"give --text-encoder FOLDER or --text-encoder google/gemma-3-12b-it"),
        ({"text_encoder": {"type": "t5"}}, {}, 'type "t5" is not supported'),
        ({"text_encoder": {"type": "minilm"}}, {}, r"text_encoder: the text encoder's config"),
        ({}, {"gemma_source_checkpoint": '{"gemma_version": "gemma4"}'}, '"gemma4"'),
    ],
)
def test_the_text_encoder_that_the_file_asks_for_is_explained(tmp_path, config, metadata, message):
    path = tmp_path / "m.safetensors"
    header = {"config": json.dumps({"transformer": {}, **config}), **metadata}
    save_file({"other": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(InputError, match=message):
        load_text_encoder(open_checkpoint(path))
