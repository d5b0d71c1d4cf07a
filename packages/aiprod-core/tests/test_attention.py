"""The attention primitive and the layers around it."""

import pytest
import torch
import torch.nn.functional as F

from aiprod_core.model.attention import attention, pick_backend
from aiprod_core.model.layers import (
    AdaLayerNormSingle,
    Attention,
    FeedForward,
    rms_norm,
    timestep_sinusoids,
)
from aiprod_core.model.rope import rotary_table


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_attention_is_the_softmax_formula():
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    mask = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    want = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + mask, dim=-1) @ v
    torch.testing.assert_close(attention(q, k, v, mask), want)


def test_a_masked_call_and_the_cpu_use_pytorchs_kernel():
    assert pick_backend(torch.device("cpu"), torch.bfloat16, has_mask=False) == "sdpa"
    assert pick_backend(torch.device("cuda", 0), torch.bfloat16, has_mask=True) == "sdpa"


def test_queries_and_keys_are_normalised_over_all_heads_together():
    attn = Attention(12, heads=3, head_dim=4).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (
        layer(x).unflatten(-1, (3, 4)).transpose(1, 2)
        for layer in (
            lambda y: rms_norm(attn.to_q(y)),
            lambda y: rms_norm(attn.to_k(y)),
            attn.to_v,
        )
    )
    scores = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
    want = attn.to_out((scores @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), want)


def test_a_head_whose_gate_is_shut_contributes_nothing():
    attn = Attention(8, heads=2, head_dim=4, is_gated=True)
    assert attn.to_gate_logits is not None
    with torch.no_grad():
        attn.to_gate_logits.weight.zero_()
        attn.to_gate_logits.bias.copy_(torch.tensor([0.0, -1e4]))  # gates 1 and 0
        x = torch.randn(1, 3, 8)
        before = attn(x)
        attn.to_v.weight[4:].normal_()  # the second head's values
        torch.testing.assert_close(attn(x), before)
        attn.to_v.weight[:4].normal_()
        assert not torch.allclose(attn(x), before)


def test_not_keeping_attention_passes_every_tokens_own_value():
    attn = Attention(8, heads=2, head_dim=4, is_gated=True)
    assert attn.to_gate_logits is not None
    x = torch.randn(2, 3, 8)
    gates = 2 * torch.sigmoid(attn.to_gate_logits(x))
    want = attn.to_out((attn.to_v(x).unflatten(-1, (2, 4)) * gates[..., None]).flatten(2))
    torch.testing.assert_close(attn(x, keep=False), want)
    mixed = attn(x, keep=torch.tensor([True, False])[:, None, None])
    torch.testing.assert_close(mixed[0], attn(x)[0])
    torch.testing.assert_close(mixed[1], want[1])


def test_self_attention_depends_on_distances_not_on_places():
    """A shift of all positions leaves scores of rotated queries and keys as they were."""
    attn = Attention(16, heads=2, head_dim=8)
    x = torch.randn(1, 6, 16)
    positions = torch.rand(1, 1, 6) * 10

    def run(shift: float) -> torch.Tensor:
        return attn(x, rotary=rotary_table(positions + shift, (20,), 16, theta=100.0))

    torch.testing.assert_close(run(0.0), run(5.0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(0.0), attn(x), atol=1e-3)


def test_attention_to_a_context_takes_its_own_width_and_length():
    attn = Attention(8, 20, heads=2, head_dim=3)
    assert attn.to_k.weight.shape == (6, 20)
    assert attn(torch.randn(2, 5, 8), torch.randn(2, 9, 20)).shape == (2, 5, 8)


def test_feed_forward_is_four_times_as_wide_inside():
    ff = FeedForward(6, bias=False)
    x = torch.randn(2, 3, 6)
    first, last = ff.get_parameter("net.0.proj.weight"), ff.get_parameter("net.2.weight")
    assert first.shape == (24, 6)
    assert sum(p.ndim == 1 for p in ff.parameters()) == 0
    torch.testing.assert_close(ff(x), F.gelu(x @ first.T, approximate="tanh") @ last.T)


def test_sinusoids_start_with_cosines_and_slow_down_geometrically():
    sinusoids = timestep_sinusoids(torch.tensor([[0.0, 2.0]]), 256)
    assert sinusoids.shape == (1, 2, 256)
    assert sinusoids[0, 0, :128].eq(1).all() and sinusoids[0, 0, 128:].eq(0).all()
    frequency = 10000 ** (-torch.arange(128) / 128)
    torch.testing.assert_close(sinusoids[0, 1, 128:], torch.sin(2 * frequency))


def test_modulation_reads_the_embedding_through_silu():
    adaln = AdaLayerNormSingle(8, rows=3)
    modulation, embedding = adaln(torch.tensor([[10.0], [700.0]]))
    assert modulation.shape == (2, 1, 3, 8)
    torch.testing.assert_close(modulation.flatten(2), adaln.linear(F.silu(embedding)))


def test_a_training_in_16_bits_attends_in_32():
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16().requires_grad_() for n in (5, 7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    out.float().sum().backward()
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = attention(*wide)
    want.sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want.bfloat16(), rtol=0, atol=0)  # rounded once, at the end
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.bfloat16(), rtol=1e-2, atol=1e-3)
