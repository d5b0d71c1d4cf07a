"""What is constant over the steps is computed once, and nothing changes by it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from aiprod_core.components.constants import Ahead, Remembering, computed_ahead, computed_once
from aiprod_core.components.guiders import Guidance, GuidedDenoiser, GuidedModality
from aiprod_core.model.layers import AdaLayerNormSingle
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.types import AV, LatentState, Modality

Build = Callable[[TransformerConfig], Transformer]
Inputs = Callable[..., tuple[Modality, Modality]]


def guided(modality: Modality) -> GuidedModality:
    state = LatentState(
        modality.latent,
        modality.latent,
        torch.ones_like(modality.latent[..., :1]),
        modality.positions,
    )
    return GuidedModality(state, modality.context, modality.context + 1, Guidance(cfg_scale=2))


def count_calls(module: nn.Module) -> list[int]:
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    module.register_forward_hook(count)
    return calls


def test_steps_are_the_same_and_text_keys_of_2_0_are_computed_once(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = (guided(modality) for modality in modalities(tiny_config))
    x = AV(video.state.latent, audio.state.latent)

    def steps(passes_a_call: int | None) -> list[AV]:
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        denoise = GuidedDenoiser(transformer, sigmas, video, audio, max_batch_size=passes_a_call)
        return [denoise(x, sigma) for sigma in (1.0, 0.5)]

    with torch.inference_mode():
        for passes_a_call, calls_a_step in ((None, 1), (2, 2)):
            want = steps(passes_a_call)
            calls = count_calls(transformer.transformer_blocks[0].attn2.to_k)
            with computed_once(transformer):
                got = steps(passes_a_call)
            is_constant = not tiny_config.cross_attention_adaln
            assert calls[0] == calls_a_step * (1 if is_constant else 2)
            for ours, reference in zip(got, want, strict=True):
                assert torch.equal(ours.video, reference.video)
                assert torch.equal(ours.audio, reference.audio)
    assert "keys_values" not in vars(transformer.transformer_blocks[0].attn2)


def test_tokens_of_one_noise_level_share_a_row_of_modulation(
    tiny_config: TransformerConfig, modalities: Inputs
):
    seen: list[Modality] = []

    def model(video, audio, perturbations=None):
        seen.append(video)
        return video.latent, None

    video, _ = modalities(tiny_config)
    whole = guided(video)
    mask = whole.state.denoise_mask.clone()
    mask[:, 0] = 0
    partly = replace(whole, state=replace(whole.state, denoise_mask=mask))
    for modality in (whole, partly):
        denoise = GuidedDenoiser(model, torch.tensor([0.5, 0.0]), modality, None)
        denoise(AV(modality.state.latent), 0.5)
    shared, per_token = (modality.timesteps for modality in seen)
    assert shared.shape == (4, 1, 1)
    assert per_token.shape == (4, 12, 1)
    assert torch.equal(per_token[:, 1:], shared.expand(-1, 11, -1))
    assert (per_token[:, 0] == 0).all()


def test_a_changed_input_is_computed_anew_and_old_results_are_dropped():
    calls: list[torch.Tensor] = []
    double = Remembering(lambda x: calls.append(x) or 2 * x, capacity=2)
    first = torch.ones(3)
    assert torch.equal(double(first), double(first))
    assert len(calls) == 1
    first.add_(1)
    assert torch.equal(double(first), torch.full((3,), 4.0))
    assert torch.equal(double(first[:2]), torch.full((2,), 4.0))  # the same memory, less of it
    assert len(calls) == 3
    double(torch.zeros(3))
    double(first)  # was dropped
    assert len(calls) == 5


def test_modulations_of_a_schedule_are_computed_once_for_all_steps(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = (guided(modality) for modality in modalities(tiny_config))
    x = AV(video.state.latent, audio.state.latent)
    sigmas = torch.tensor([1.0, 0.7, 0.5, 0.0])

    def steps() -> list[AV]:
        denoise = GuidedDenoiser(transformer, sigmas, video, audio)
        return [denoise(x, sigma) for sigma in (*sigmas[:-1].tolist(), 0.6)]  # one is not in it

    with torch.inference_mode():
        want = steps()
        networks = [m for m in transformer.children() if isinstance(m, AdaLayerNormSingle)]
        calls = [count_calls(network.linear) for network in networks]
        with computed_ahead(transformer, sigmas):
            got = steps()
        assert len(calls) >= 6
        assert calls == [[2]] * len(calls)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours.video, reference.video, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.audio, reference.audio, atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(transformer.adaln_single)


def test_tokens_of_several_noise_levels_are_not_taken_for_a_schedules():
    double = Ahead(lambda t: (2 * t[..., None],), torch.tensor([1.0, 0.5]))
    for timesteps in (torch.tensor([[1.0], [0.5]]), torch.tensor([[0.5, 0.0]]), torch.ones(2, 1)):
        (found,) = double(timesteps)
        assert torch.equal(found, 2 * timesteps[..., None])
