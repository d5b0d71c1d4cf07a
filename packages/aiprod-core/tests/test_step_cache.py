"""Forecast steps: exact where the velocity is a polynomial, trusted no further than they proved."""

from itertools import pairwise

import pytest
import torch

from aiprod_core.components.samplers import euler
from aiprod_core.components.step_cache import (
    POLICIES,
    CachePolicy,
    StepCache,
    forecast,
    relative_error,
)
from aiprod_core.types import AV

SIGMAS = torch.linspace(1, 0, 41)


def denoiser_of(velocity):
    """A model whose velocity is a function of sigma alone; counts its calls."""
    calls: list[float] = []

    def denoise(x: AV, sigma: float) -> AV:
        calls.append(sigma)
        return x - velocity(sigma) * sigma

    return denoise, calls


def av(*values: float) -> AV:
    return AV(torch.tensor(values)[None, :, None], torch.tensor(values[:2])[None, :, None])


def start() -> AV:
    return av(1.0, -1.0, 0.5)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_a_polynomial_is_continued_exactly(degree: int):
    def value(sigma: float) -> AV:
        return av(*(c * sigma**degree + 1 for c in (1.0, 2.0, -3.0)))

    points = [(sigma, value(sigma)) for sigma in (0.9, 0.7, 0.6)[: degree + 1]]
    assert relative_error(forecast(points, 0.4), value(0.4)) < 1e-5


def test_a_straight_path_is_computed_once_in_a_few_steps_and_ends_at_the_same_place():
    def velocity(sigma: float) -> AV:
        return av(1.0 + sigma, 2.0 - sigma, 0.5)

    denoise, calls = denoiser_of(velocity)
    expected = euler(denoise, start(), SIGMAS)
    assert len(calls) == 40
    calls.clear()
    cache = StepCache(denoise, SIGMAS, POLICIES["fast"])
    found = euler(cache, start(), SIGMAS)
    torch.testing.assert_close(found.video, expected.video)
    torch.testing.assert_close(found.audio, expected.audio)
    assert cache.computed == len(calls) <= 14
    assert cache.computed + cache.skipped == 40


def test_what_cannot_be_foretold_is_computed():
    def velocity(sigma: float) -> AV:
        generator = torch.Generator().manual_seed(round(sigma * 1e6))
        return AV(torch.randn(1, 3, 1, generator=generator))

    denoise, calls = denoiser_of(velocity)
    cache = StepCache(denoise, SIGMAS, POLICIES["fast"])
    found = euler(cache, AV(start().video), SIGMAS)
    assert cache.skipped == 0
    calls.clear()
    torch.testing.assert_close(found.video, euler(denoise, AV(start().video), SIGMAS).video)


def test_short_steps_are_skipped_before_long_ones():
    def velocity(sigma: float) -> AV:
        generator = torch.Generator().manual_seed(round(sigma * 1e6))
        return AV(1 + 0.3 * torch.randn(1, 50, 1, generator=generator))

    sigmas = torch.cat((torch.linspace(1, 0.9, 21), torch.linspace(0.9, 0, 20)[1:]))
    denoise, calls = denoiser_of(velocity)
    euler(StepCache(denoise, sigmas, POLICIES["fast"]), AV(torch.zeros(1, 50, 1)), sigmas)
    short = sum(sigma > 0.9 for sigma in calls)
    assert short < 14
    assert len(calls) - short > 17


def test_fewer_steps_are_computed_the_more_error_is_allowed():
    def velocity(sigma: float) -> AV:
        return av(*(torch.sin(torch.tensor(k * sigma * 3.0)) + 1.5 for k in (1.0, 2.0, 3.0)))

    denoise, _ = denoiser_of(velocity)
    expected = euler(denoise, start(), SIGMAS)
    computed, errors = [], []
    for tolerance in (0.001, 0.01, 0.1):
        cache = StepCache(denoise, SIGMAS, CachePolicy(tolerance, max_skipped=4))
        errors.append(relative_error(euler(cache, start(), SIGMAS), expected))
        computed.append(cache.computed)
    assert computed == sorted(computed, reverse=True)
    assert computed[-1] < computed[0]
    assert errors[0] < 0.002


def test_the_first_steps_and_the_last_are_always_computed():
    denoise, calls = denoiser_of(lambda sigma: av(1.0, 2.0, 3.0))
    policy = CachePolicy(tolerance=1.0, max_skipped=100, warmup=3)
    euler(StepCache(denoise, SIGMAS, policy), start(), SIGMAS)
    levels = SIGMAS.tolist()
    assert calls == [*levels[:3], levels[-2]]


def test_a_row_of_skipped_steps_is_bounded():
    denoise, calls = denoiser_of(lambda sigma: av(1.0, 2.0, 3.0))
    policy = CachePolicy(tolerance=1.0, max_skipped=3, warmup=2)
    euler(StepCache(denoise, SIGMAS, policy), start(), SIGMAS)
    steps = [round(40 * (1 - sigma)) for sigma in calls]
    assert max(b - a for a, b in pairwise(steps)) == 4
