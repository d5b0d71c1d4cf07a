import json

import pytest
import torch
from safetensors.torch import save_file

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_duration_head
from aiprod_core.model.duration_head import DurationHead, DurationHeadConfig, frames_for_duration

SECTION = {"pooler_hidden_dim": 12, "num_queries": 3, "num_pooler_heads": 4, "mlp_hidden": 5}
TRANSFORMER = {"cross_attention_dim": 10, "audio_cross_attention_dim": 6}


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = DurationHead(DurationHeadConfig.from_metadata(SECTION, TRANSFORMER)).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def test_the_order_of_context_positions_does_not_change_the_duration(head):
    video, audio = torch.randn(2, 8, 10), torch.randn(2, 8, 6)
    torch.testing.assert_close(head(video, audio), head(video.flip(1), audio.flip(1)))


def test_both_modalities_count_and_either_may_be_absent(head):
    video, audio = torch.randn(2, 8, 10), torch.randn(2, 8, 6)
    both, only_video, only_audio = head(video, audio), head(video, None), head(None, audio)
    assert both.shape == only_video.shape == only_audio.shape == (2,)
    assert (both > 0).all()
    assert (both / only_video).log().abs().min() > 0.01
    assert (both / only_audio).log().abs().min() > 0.01
    with pytest.raises(InputError, match="one modality at least"):
        head(None, None)


def test_the_pooling_is_softmax_attention_of_the_queries_by_hand(head):
    pooler = head.attention_pooler
    x = torch.randn(1, 7, 12)
    q_weight, k_weight, v_weight = pooler.cross_attn.in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = pooler.cross_attn.in_proj_bias.chunk(3)
    q = (pooler.query_tokens @ q_weight.T + q_bias).unflatten(-1, (4, 3))  # (Q, heads, d)
    k = (x[0] @ k_weight.T + k_bias).unflatten(-1, (4, 3))
    v = (x[0] @ v_weight.T + v_bias).unflatten(-1, (4, 3))
    weights = (torch.einsum("qhd,shd->hqs", q, k) / 3**0.5).softmax(dim=-1)
    mixed = torch.einsum("hqs,shd->qhd", weights, v).flatten(1)
    torch.testing.assert_close(pooler(x)[0], pooler.cross_attn.out_proj(mixed))


def test_the_head_loads_from_its_own_file(head, tmp_path):
    config = {"transformer": TRANSFORMER, "duration_head": SECTION}
    tensors = {f"duration_head.{name}": t for name, t in head.state_dict().items()}
    save_file(tensors, tmp_path / "d.safetensors", metadata={"config": json.dumps(config)})
    loaded = load_duration_head(open_checkpoint(tmp_path / "d.safetensors"))
    video = torch.randn(1, 4, 10)
    torch.testing.assert_close(loaded(video, None), head(video, None))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(CheckpointError, match="num_pooler_heads is 5"):
        DurationHeadConfig.from_metadata({**SECTION, "num_pooler_heads": 5}, TRANSFORMER)


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [
        (5.0, 24, 113),  # 120 frames hold 113 = 8 * 14 + 1
        (121 / 24, 24, 121),  # already on the grid
        (0.2, 24, 25),  # clamped to 1 s = 24 frames, 17 would be too short
        (99.0, 25, 497),  # clamped to 20 s = 500 frames
    ],
)
def test_durations_are_clamped_and_snapped_down_to_the_frame_grid(seconds, fps, frames):
    assert frames_for_duration(seconds, fps) == frames
