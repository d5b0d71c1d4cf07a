"""Guidance formulas and the batched guided denoiser, on a tiny transformer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aiprod_core.components import conditioning, guiders, samplers
from aiprod_core.components.denoising import denoise
from aiprod_core.components.guiders import Guidance, GuidedDenoiser, GuidedModality
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.errors import InputError
from aiprod_core.types import AV, AudioLatentShape, ScaleFactors, VideoLatentShape

GRID = VideoGrid(VideoLatentShape(1, 6, 2, 2, 3), ScaleFactors(8, 32, 32), 24.0)
AUDIO = AudioGrid(AudioLatentShape(1, 2, 5, 2))
SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.0])
STRONG = Guidance(cfg_scale=4.0, stg_scale=1.0, stg_blocks=(1,), rescale=0.7, modality_scale=3.0)


@pytest.fixture
def run(tiny_config, randomised):
    """The tiny transformer, a count of its calls, and both modalities with random text."""

    class Run:
        def __init__(self) -> None:
            self.network = randomised(tiny_config)
            self.batches: list[int] = []
            self.enabled: list[bool] = []
            generator = torch.Generator().manual_seed(0)

            def text(width: int) -> Tensor:
                return torch.randn(1, 4, tiny_config.caption_channels or width, generator=generator)

            width, audio_width = tiny_config.width, tiny_config.audio_width
            self.video = GuidedModality(
                conditioning.video_state(GRID), text(width), text(width), STRONG
            )
            self.audio = GuidedModality(
                conditioning.audio_state(AUDIO), text(audio_width), text(audio_width), STRONG
            )
            self.x = AV(
                torch.randn(1, 12, 6, generator=generator),
                torch.randn(1, 5, 4, generator=generator),
            )

        def transformer(self, video, audio, perturbations=None):
            self.batches.append(len((video or audio).latent))
            self.enabled.append(video is not None and video.enabled)
            return self.network(video, audio, perturbations)

        def denoiser(self, video=None, audio=None, **options) -> GuidedDenoiser:
            return GuidedDenoiser(
                self.transformer, SIGMAS, video or self.video, audio or self.audio, **options
            )

        def unguided(self, **changes) -> tuple[GuidedModality, GuidedModality]:
            return (
                replace(self.video, guidance=Guidance(**changes)),
                replace(self.audio, guidance=Guidance(**changes)),
            )

    return Run()


def assert_close(a: AV, b: AV) -> None:
    torch.testing.assert_close(a.video, b.video, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.audio, b.audio, rtol=1e-4, atol=1e-4)


def test_without_guidance_only_the_prompt_is_asked(run) -> None:
    video, audio = run.unguided()
    run.denoiser(video, audio)(run.x, 0.7)
    assert run.batches == [1]


def test_all_passes_are_one_batch_and_split_to_the_same_result(run) -> None:
    whole = run.denoiser()(run.x, 0.7)
    assert run.batches == [4]
    for size, batches in ((1, [1] * 4), (3, [3, 1])):
        run.batches.clear()
        assert_close(run.denoiser(max_batch_size=size)(run.x, 0.7), whole)
        assert run.batches == batches


def test_guidance_moves_the_estimate_from_the_negative_prompt(run) -> None:
    def estimate(scale: float, negative: Tensor) -> Tensor:
        video, audio = run.unguided(cfg_scale=scale)
        video = replace(video, negative_context=negative)
        return run.denoiser(video, audio)(run.x, 0.7).video

    other = run.video.negative_context
    cond = estimate(1.0, other)
    guided = estimate(3.0, other)
    _, uncond = run.denoiser(*run.unguided()).with_uncond(run.x, 0.7)
    torch.testing.assert_close(guided, cond + 2 * (cond - uncond.video), rtol=1e-4, atol=1e-4)
    assert (guided - cond).abs().max() > 1e-2


def test_a_negative_prompt_equal_to_the_prompt_guides_nothing(run) -> None:
    video, audio = run.unguided(cfg_scale=5.0)
    video = replace(video, negative_context=None)
    audio = replace(audio, negative_context=None)
    plain = run.denoiser(*run.unguided())(run.x, 0.7)
    assert_close(run.denoiser(video, audio)(run.x, 0.7), plain)


def test_a_skipped_step_reuses_the_video_and_still_moves_the_sound(run) -> None:
    video = replace(run.video, guidance=replace(STRONG, skip_step=1))
    denoiser = run.denoiser(video)
    first = denoiser(run.x, 1.0)
    second = denoiser(run.x * 0.9, 0.7)
    assert torch.equal(first.video, second.video)
    assert (first.audio - second.audio).abs().max() > 1e-3
    assert run.enabled == [True, False]


def test_when_both_skip_the_model_is_not_called(run) -> None:
    denoiser = run.denoiser(*run.unguided(skip_step=1))
    for sigma in (1.0, 0.7, 0.5, 0.4):  # 0.5 is a stage within the second step
        denoiser(run.x, sigma)
    assert len(run.batches) == 2


def test_outside_its_interval_guidance_is_off(run) -> None:
    guided = replace(STRONG, interval=(0.5, 0.8))
    video, audio = (replace(m, guidance=guided) for m in (run.video, run.audio))
    denoiser = run.denoiser(video, audio)
    for sigma in (1.0, 0.7, 0.4):
        denoiser(run.x, sigma)
    assert run.batches == [1, 4, 1]


def test_binned_guidance_takes_the_next_key_above(run) -> None:
    table = {1.0: STRONG, 0.5: Guidance()}
    video, audio = (replace(m, guidance=table) for m in (run.video, run.audio))
    denoiser = run.denoiser(video, audio)
    for sigma in (1.0, 0.7, 0.4):
        denoiser(run.x, sigma)
    assert run.batches == [4, 4, 1]


def test_a_frozen_sound_is_seen_but_comes_out_as_it_was(run) -> None:
    latent = torch.randn(AUDIO.shape)
    state = conditioning.freeze(conditioning.audio_state(AUDIO, latent))
    audio = GuidedModality(state, run.audio.context, is_frozen=True)
    generator = torch.Generator().manual_seed(0)
    out = denoise(run.transformer, SIGMAS, run.video, audio, generator=generator)
    assert torch.equal(AUDIO.unpatchify(out.audio), latent)
    other = replace(audio, state=conditioning.freeze(conditioning.audio_state(AUDIO)))
    generator = torch.Generator().manual_seed(0)
    deaf = denoise(run.transformer, SIGMAS, run.video, other, generator=generator)
    assert (out.video - deaf.video).abs().max() > 1e-3


def test_one_modality_alone_is_denoised_alone(run) -> None:
    denoiser = GuidedDenoiser(run.transformer, SIGMAS, None, run.audio)
    out = denoiser(AV(audio=run.x.audio), 1.0)
    assert out.video is None and out.audio.shape == (1, 5, 4)
    assert run.batches == [3]  # there is no other modality to be isolated from


def test_cfg_pp_runs_with_the_guided_denoiser(run) -> None:
    denoiser = run.denoiser()
    out = samplers.euler_cfg_pp(denoiser.with_uncond, run.x, SIGMAS, eta=0.0)
    assert out.video.isfinite().all() and out.audio.isfinite().all()


def test_contexts_of_two_lengths_are_refused(run) -> None:
    with pytest.raises(InputError, match="pad both to one length"):
        replace(run.video, negative_context=run.video.context[:, :3])


def test_full_rescale_restores_the_deviation_of_the_conditional_estimate() -> None:
    cond, uncond = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    guided = guiders.guide(Guidance(cfg_scale=6.0, rescale=1.0), cond, uncond)
    torch.testing.assert_close(guided.std(), cond.std())


def test_cfg_star_ignores_the_length_of_the_negative_estimate() -> None:
    cond, uncond = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    a, b = (guiders.cfg_star_delta(cond, uncond * scale, 4.0) for scale in (1.0, 3.0))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_apg_with_eta_1_is_cfg_and_with_eta_0_orthogonal_to_the_estimate() -> None:
    cond, uncond = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    torch.testing.assert_close(
        guiders.apg_delta(cond, uncond, 5.0), guiders.cfg_delta(cond, uncond, 5.0)
    )
    delta = guiders.apg_delta(cond, uncond, 5.0, eta=0.0)
    assert (delta * cond).sum((1, 2)).abs().max() < 1e-3


def test_apg_clips_long_differences_only() -> None:
    cond = torch.randn(1, 9, 4)
    long = guiders.apg_delta(cond, cond + 10, 2.0, norm_threshold=1.5)
    torch.testing.assert_close(long.norm().item(), 1.5)
    short = guiders.apg_delta(cond, cond + 1e-3, 2.0, norm_threshold=1.5)
    torch.testing.assert_close(short, torch.full_like(cond, -1e-3), rtol=1e-3, atol=1e-6)


def test_momentum_apg_remembers_the_last_difference() -> None:
    cond, uncond = torch.randn(1, 9, 4), torch.randn(1, 9, 4)
    apg = guiders.MomentumAPG(momentum=0.5)
    first, second = apg(cond, uncond, 1.0), apg(cond, uncond, 1.0)
    torch.testing.assert_close(second, first * 1.5)
