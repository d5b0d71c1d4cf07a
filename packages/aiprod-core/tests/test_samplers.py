"""Samplers on data whose denoiser and solution are known in closed form, in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from aiprod_core.components import samplers
from aiprod_core.types import AV

MEAN, STD = 1.5, 0.4


def gaussian_denoise(x: AV, sigma: float) -> AV:
    """The exact clean estimate for data from N(MEAN, STD^2)."""
    alpha = 1 - sigma
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return x.map(lambda v: MEAN + gain * (v - alpha * MEAN))


def gaussian_solution(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Where the probability-flow ODE leads: a point keeps its quantile."""

    def std(sigma: float) -> float:
        return ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5

    return (1 - sigma_next) * MEAN + (x - (1 - sigma) * MEAN) * std(sigma_next) / std(sigma)


def two_points_denoise(x: AV, sigma: float) -> AV:
    """The exact clean estimate for data that is -1 or 1 with equal chances."""
    return x.map(lambda v: torch.tanh(v * (1 - sigma) / sigma**2))


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(seed: int = 0) -> AV:
    return AV(noise(1, 6, 4, seed=seed), noise(1, 5, 3, seed=seed + 1))


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uneven_sigmas(steps: int) -> Tensor:
    """From 0.9 to 0.2, smoothly uneven, away from the ends where steps are first order."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return 0.9 - 0.7 * (0.6 * t + 0.4 * t**2)


def even_sigmas(steps: int) -> Tensor:
    return torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64)


DETERMINISTIC = {
    "euler": (samplers.euler, 1, uneven_sigmas),
    "ddim": (samplers.ddim, 1, uneven_sigmas),
    "ancestral eta 0": (partial(samplers.euler_ancestral, eta=0.0), 1, uneven_sigmas),
    "heun": (samplers.heun, 2, uneven_sigmas),
    "dpmpp 2m": (samplers.dpmpp_2m, 2, uneven_sigmas),
    # With gamma 3/2 and even steps this is Adams-Bashforth of order 2.
    "gradient estimation 1.5": (
        partial(samplers.gradient_estimation, gamma=1.5),
        2,
        even_sigmas,
    ),
}
STOCHASTIC = {
    "ancestral": samplers.euler_ancestral,
    "ddim eta 1": partial(samplers.ddim, eta=1.0),
    "dpmpp 2m sde": samplers.dpmpp_2m_sde,
    "res 2s": samplers.res_2s,
}


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_halving_the_step_divides_the_error_by_two_to_the_order(name: str) -> None:
    sampler, order, sigmas_of = DETERMINISTIC[name]
    x = noise(1, 50, 2)

    def error(steps: int) -> float:
        out = sampler(gaussian_denoise, AV(video=x), sigmas_of(steps)).video
        return (out - gaussian_solution(x, 0.9, 0.2)).abs().max().item()

    coarse, fine = error(320), error(640)
    assert fine < 0.01
    assert coarse / fine == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_samplers_draw_from_the_data_s_distribution(name: str) -> None:
    x = AV(video=noise(1, 20000, 1))
    sigmas = torch.linspace(1, 0, 81, dtype=torch.float64)
    out = STOCHASTIC[name](gaussian_denoise, x, sigmas, generator=generator()).video
    # 20000 samples know the mean to 0.003 and the deviation to 0.5 %; the steps add a bias.
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.06)


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_a_mixture_of_two_points_is_recovered_with_equal_shares(name: str) -> None:
    x = AV(video=noise(1, 2000, 1))
    sigmas = torch.linspace(1, 0, 41, dtype=torch.float64)
    out = samplers.SAMPLERS[name](two_points_denoise, x, sigmas, generator=generator()).video
    assert ((out.abs() - 1).abs() < 0.02).double().mean().item() > 0.98
    assert (out > 0).double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_an_absent_modality_passes_through_as_none(name: str) -> None:
    x = AV(audio=noise(1, 5, 3))
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    out = samplers.SAMPLERS[name](gaussian_denoise, x, sigmas, generator=generator())
    assert out.video is None
    assert out.audio is not None and out.audio.shape == (1, 5, 3)


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_one_seed_gives_one_result_and_conditioned_tokens_stay(name: str) -> None:
    x, clean = pair(), noise(1, 6, 4, seed=9)
    mask = torch.ones(1, 6, 1, dtype=torch.float64)
    mask[:, :2] = 0

    def blend(x: AV) -> AV:
        return AV(x.video * mask + clean * (1 - mask), x.audio)

    def sample(seed: int) -> AV:
        sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
        sampler = samplers.SAMPLERS[name]
        return sampler(gaussian_denoise, x, sigmas, generator=generator(seed), blend=blend)

    first, again = sample(5), sample(5)
    assert torch.equal(first.video, again.video) and torch.equal(first.audio, again.audio)
    torch.testing.assert_close(first.video[:, :2], clean[:, :2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["euler-ancestral", "dpmpp-2m-sde", "res-2s"])
def test_another_seed_gives_another_result(name: str) -> None:
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
    sampler = samplers.SAMPLERS[name]
    outs = [sampler(gaussian_denoise, pair(), sigmas, generator=generator(s)) for s in (1, 2)]
    assert (outs[0].video - outs[1].video).abs().max() > 1e-3


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.ddim,
        partial(samplers.euler_ancestral, eta=0.0),
        partial(samplers.gradient_estimation, gamma=1.0),
        lambda d, x, s, **k: samplers.euler_cfg_pp(lambda x, s: (d(x, s),) * 2, x, s, eta=0.0, **k),
    ],
    ids=["ddim", "ancestral", "gradient-estimation", "cfg++"],
)
def test_without_its_extra_each_first_order_sampler_is_euler(sampler) -> None:
    sigmas = torch.tensor([1.0, 0.8, 0.45, 0.1, 0.0])
    got = sampler(gaussian_denoise, pair(), sigmas, generator=generator())
    want = samplers.euler(gaussian_denoise, pair(), sigmas)
    torch.testing.assert_close(got.video, want.video, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.audio, want.audio, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [1.0, 0.7])
@pytest.mark.parametrize("sampler", [samplers.dpmpp_2m, samplers.dpmpp_2m_sde])
def test_the_first_dpmpp_step_is_an_euler_step(sampler, sigma: float) -> None:
    sigmas = torch.tensor([sigma, 0.5])
    got = sampler(gaussian_denoise, pair(), sigmas, generator=generator())
    want = samplers.euler(gaussian_denoise, pair(), sigmas)
    torch.testing.assert_close(got.video, want.video)


def test_the_fixed_point_equals_a_hundred_anchor_refinements() -> None:
    x_mid, denoised, c = 0.3, -0.8, 0.49 * samplers.res_2s_coefficients(0.49)[0]
    anchor = 5.0
    for _ in range(100):
        anchor = x_mid - c * (denoised - anchor)
    assert anchor == pytest.approx((x_mid - c * denoised) / (1 - c), abs=1e-14)


def test_phi2_is_smooth_where_its_formula_would_cancel() -> None:
    assert samplers.phi2(-1e-9) == pytest.approx(0.5, abs=1e-9)
    assert samplers.phi2(-1.01e-4) == pytest.approx(samplers.phi2(-0.99e-4), abs=1e-6)


def test_the_state_stays_in_float32_under_a_bfloat16_start() -> None:
    seen = []

    def denoise(x: AV, sigma: float) -> AV:
        seen.append(x.video.dtype)
        return gaussian_denoise(x, sigma)

    sigmas = torch.tensor([1.0, 0.5, 0.0])
    out = samplers.euler(denoise, AV(video=noise(1, 4, 2).bfloat16()), sigmas)
    assert seen == [torch.float32] * 2 and out.video.dtype == torch.float32


def test_the_callback_is_called_once_a_step_in_order() -> None:
    calls = []
    sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
    samplers.heun(
        gaussian_denoise, pair(), sigmas, callback=lambda i, s, x, d: calls.append((i, s))
    )
    assert calls == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_per_token_renoising_leaves_kept_tokens_alone() -> None:
    mask = torch.ones(1, 6, 1)
    mask[:, 0] = 0
    clean = noise(1, 6, 4, seed=4).float()
    x = AV(video=clean * (1 - mask) + noise(1, 6, 4).float() * mask)
    out = samplers.res_2s(
        gaussian_denoise,
        x,
        torch.tensor([1.0, 0.6, 0.0]),
        mask=AV(video=mask),
        blend=lambda x: x.map(lambda v: v * mask + clean * (1 - mask)),
        generator=generator(),
    )
    torch.testing.assert_close(out.video[:, 0], clean[:, 0])
    assert out.video.isfinite().all()
