"""The text path against diffusers' port, in float32 with the same random weights."""

import pytest
import torch

from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.transformer import PROJECTED_TEXT
from aiprod_core.parity.diffusers_peers import text_connectors_peer

pytest.importorskip("diffusers")

HIDDEN_SIZE, NUM_STATES, LENGTH = 16, 3, 16

COMMON = {
    "connector_num_learnable_registers": 8,
    "connector_positional_embedding_max_pos": [4096],
    "connector_num_layers": 2,
    "connector_num_attention_heads": 2,
}


def pair(style, rope_type, precision):
    is_2_3 = style == "2.3"
    section = {
        **COMMON,
        "rope_type": rope_type,
        "frequencies_precision": precision,
        # 2.0 has one projection, as wide as both connectors and the language model.
        "connector_attention_head_dim": 10 if is_2_3 else HIDDEN_SIZE // 2,
    }
    if is_2_3:
        section |= {
            **PROJECTED_TEXT,
            "audio_connector_num_attention_heads": 2,
            "audio_connector_attention_head_dim": 6,
            "audio_connector_num_layers": 1,
            "connector_apply_gated_attention": True,
        }
    config = TextConfig.from_metadata(section, HIDDEN_SIZE, NUM_STATES)
    torch.manual_seed(0)
    ours = TextProjector(config).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = text_connectors_peer(ours, HIDDEN_SIZE, NUM_STATES)
    return ours, theirs


@pytest.mark.parametrize("style", ["2.0", "2.3"])
@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_contexts_agree_with_diffusers(style, rope_type, precision, side):
    ours, theirs = pair(style, rope_type, precision)
    hidden_states = torch.randn(2, LENGTH, HIDDEN_SIZE, NUM_STATES)
    counts = torch.tensor([[5], [LENGTH]])
    mask = (torch.arange(LENGTH) < counts).long()
    mask = mask.flip(1) if side == "left" else mask
    video, audio, out_mask = ours(hidden_states, mask)
    wanted = theirs(hidden_states, mask, padding_side=side)
    # Float32 rounding through two blocks.
    torch.testing.assert_close(video, wanted[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(audio, wanted[1], atol=2e-5, rtol=2e-5)
    assert out_mask.tolist() == wanted[2].tolist()
