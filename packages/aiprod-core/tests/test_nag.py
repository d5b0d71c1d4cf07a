"""Normalised attention guidance: its formula, and the transformer that it is put around."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aiprod_core.components.nag import (
    NAG,
    both_prompts,
    guided_text_attention,
    normalised_guidance,
)
from aiprod_core.model.layers import Attention
from aiprod_core.types import Modality


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_negative(modality: Modality, seed: int | None) -> Modality:
    context = modality.context
    negative = context if seed is None else draw(*context.shape, seed=seed)
    return replace(modality, context=both_prompts(context, negative))


def test_scale_1_and_equal_prompts_change_nothing() -> None:
    positive, negative = draw(2, 5, 8, seed=0), draw(2, 5, 8, seed=1)
    assert torch.equal(normalised_guidance(positive, negative, NAG(1.0)), positive)
    assert torch.equal(normalised_guidance(positive, positive, NAG(9.0)), positive)


def test_the_formula_is_the_papers_number_by_number() -> None:
    positive, negative = draw(1, 3, 4, seed=0), draw(1, 3, 4, seed=1)
    nag = NAG(scale=7.0, tau=1.5, alpha=0.4)
    result = normalised_guidance(positive, negative, nag)
    for z, p, n in zip(result[0].tolist(), positive[0].tolist(), negative[0].tolist(), strict=True):
        far = [7.0 * a - 6.0 * b for a, b in zip(p, n, strict=True)]
        ratio = sum(map(abs, far)) / sum(map(abs, p))
        far = [a * min(ratio, 1.5) / ratio for a in far]
        assert z == pytest.approx([0.4 * a + 0.6 * b for a, b in zip(far, p, strict=True)])


@given(st.floats(1, 50), st.floats(0.5, 4), st.integers(0, 99))
def test_no_token_grows_beyond_tau(scale: float, tau: float, seed: int) -> None:
    positive, negative = draw(1, 6, 8, seed=seed), draw(1, 6, 8, seed=seed + 1)
    result = normalised_guidance(positive, negative, NAG(scale, tau, alpha=1.0))
    ratio = result.abs().sum(-1) / positive.abs().sum(-1)
    assert ratio.max() <= max(1.0, tau) * (1 + 1e-5)


def test_attention_within_equals_the_formula_on_two_plain_attentions() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 6, heads=2, head_dim=4, is_gated=True).requires_grad_(False)
    block = torch.nn.Module()
    block.attn2 = attention
    transformer = torch.nn.Module()
    transformer.transformer_blocks = torch.nn.ModuleList([block])
    x, prompt, negative = draw(2, 5, 8, seed=0), draw(2, 3, 6, seed=1), draw(2, 3, 6, seed=2)
    mask = torch.where(draw(2, 1, 1, 6, seed=3) > 1, -1e9, 0.0)
    nag = NAG(5.0)
    z = normalised_guidance(
        attention.mixed(x, prompt, mask=mask[..., :3]),
        attention.mixed(x, negative, mask=mask[..., 3:]),
        nag,
    )
    with guided_text_attention(transformer, video=nag):
        guided = attention(x, both_prompts(prompt, negative), mask=mask)
    torch.testing.assert_close(guided, attention.to_out(z))
    assert "forward" not in vars(attention)


def test_a_transformer_is_guided_within_and_itself_again_after(
    tiny_config, randomised, modalities
) -> None:
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    plain = transformer(video, audio)
    nag = NAG(6.0)
    with guided_text_attention(transformer, video=nag, audio=nag):
        same = transformer(with_negative(video, None), with_negative(audio, None))
        other = transformer(with_negative(video, 5), with_negative(audio, 6))
    for a, b, c in zip(plain, same, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert (a - c).abs().max() > 1e-2
    with guided_text_attention(transformer, video=nag):  # the sound is left alone
        _, sound = transformer(with_negative(video, None), audio)
    torch.testing.assert_close(sound, plain[1], rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(RuntimeError, match="stopped"),
        guided_text_attention(transformer, video=nag, audio=nag),
    ):
        raise RuntimeError("stopped")
    assert torch.equal(transformer(video, audio)[0], plain[0])
