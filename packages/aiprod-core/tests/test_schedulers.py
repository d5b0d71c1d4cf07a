"""Sigma schedules."""

import pytest
import torch

from aiprod_core.components import schedulers
from aiprod_core.errors import InputError


@pytest.mark.parametrize("name", sorted(schedulers.SCHEDULES))
@pytest.mark.parametrize("steps", [2, 7, 40])
def test_schedules_fall_strictly_from_at_most_one_to_zero(name: str, steps: int) -> None:
    sigmas = schedulers.SCHEDULES[name](steps)
    assert sigmas.shape == (steps + 1,)
    assert 0.9 < sigmas[0] <= 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("name", sorted(schedulers.SCHEDULES))
def test_a_schedule_of_no_steps_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="at least 1; got 0"):
        schedulers.SCHEDULES[name](0)


def test_one_shifted_step_goes_from_noise_to_clean() -> None:
    torch.testing.assert_close(schedulers.shifted(1), torch.tensor([1.0, 0.0]))


def test_the_shifted_schedule_ends_at_its_terminal_sigma() -> None:
    assert schedulers.shifted(30, terminal=0.05)[-2].item() == pytest.approx(0.05, abs=1e-6)


def test_more_tokens_keep_the_shifted_schedule_noisy_for_longer() -> None:
    few, many = (schedulers.shifted(20, num_tokens=n, terminal=None) for n in (1024, 8192))
    assert (many[1:-1] > few[1:-1]).all()


def test_without_shift_and_stretch_the_schedule_is_even() -> None:
    sigmas = schedulers.shifted(10, min_shift=0.0, max_shift=0.0, terminal=None)
    torch.testing.assert_close(sigmas, torch.linspace(1, 0, 11))


def test_the_two_parts_of_the_linear_quadratic_schedule_meet_with_one_slope() -> None:
    sigmas = schedulers.linear_quadratic(1000, threshold=0.3, linear_steps=500).double()
    before, after = sigmas[499] - sigmas[500], sigmas[500] - sigmas[501]
    assert after.item() == pytest.approx(before.item(), rel=0.01)
    assert sigmas[500].item() == pytest.approx(0.7, abs=1e-6)


def test_equal_beta_quantiles_are_merged() -> None:
    sigmas = schedulers.beta(400, table_size=50)
    assert len(sigmas) < 401 and (sigmas.diff() < 0).all()


def test_karras_spacing_has_the_paper_s_ends_on_the_flow_path() -> None:
    sigmas = schedulers.karras(10, sigma_min=0.01, sigma_max=50.0).double()
    s = sigmas[:-1] / (1 - sigmas[:-1])
    assert s[0].item() == pytest.approx(50.0, rel=1e-4)
    assert s[-1].item() == pytest.approx(0.01, rel=1e-4)
    gaps = (s ** (1 / 7)).diff()  # even in sigma^(1/rho)
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-3, atol=1e-5)


def test_stage_2_is_the_end_of_the_distilled_schedule() -> None:
    assert schedulers.DISTILLED[-4:] == schedulers.STAGE_2
