"""Sigma schedules: functions from a number of steps to a float32 table of steps + 1 noise levels.

Sigma is the noise level on the flow path, noisy = (1 - sigma) clean + sigma noise, so it falls from
1 (pure noise) to 0 (clean). The variance-exploding sigma s of the EDM papers, noisy = clean +
s noise, is the same point up to scale at sigma = s / (1 + s).
"""

import math

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from aiprod_core.errors import InputError

# The levels that the distilled checkpoints were trained on.
DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
DISTILLED_IN_4 = (1.0, 0.909375, 0.725, 0.421875, 0.0)  # ours
STAGE_2 = (0.909375, 0.725, 0.421875, 0.0)
STAGE_2_TILED = (0.625, 0.4, 0.0)
STAGE_2_HDR = (0.909375, 0.725, 0.0)
DFR_TEMPORAL = DISTILLED[4:]


def table(sigmas: tuple[float, ...]) -> Tensor:
    """A fixed schedule, such as `DISTILLED`, as the samplers take it."""
    return torch.tensor(sigmas, dtype=torch.float32)


def distilled(steps: int) -> Tensor:
    """The fixed levels of a distilled model. Raises InputError for other than 8 or 4 steps."""
    tables = {len(sigmas) - 1: sigmas for sigmas in (DISTILLED, DISTILLED_IN_4)}
    if steps not in tables:
        nearest = 8 if steps > 6 else 4
        raise InputError(
            f"the distilled schedule has 8 or 4 steps; got {steps}, try {nearest}, "
            "or another schedule such as shifted."
        )
    return table(tables[steps])


def shifted(
    steps: int,
    *,
    num_tokens: int = 4096,  # video latent tokens; pipelines other than HQ keep the default
    min_shift: float = 0.95,  # log of the shift at 1024 tokens
    max_shift: float = 2.05,  # log of the shift at 4096 tokens
    terminal: float | None = 0.1,  # stretch so that the last sigma before 0 is this; None = do not
) -> Tensor:
    """The schedule of the undistilled LTX-2 models: uniform, shifted towards noise, stretched.

    The shift is the resolution-dependent one of Esser et al. 2024 (arXiv:2403.03206, eq. 23).
    """
    _check_steps(steps)
    # In float32 and in this order the table equals the published one to the last bit. That shows:
    # timesteps are 1000 sigma, and guidance multiplies what their rounding does.
    u = torch.linspace(1.0, 0.0, steps + 1)
    mu = min_shift + (num_tokens - 1024) * (max_shift - min_shift) / (4096 - 1024)
    sigmas = math.exp(mu) / (math.exp(mu) + (1 / u - 1))
    if terminal is not None and steps > 1:  # one step has no sigma between 1 and 0
        done = 1 - sigmas[:-1]
        sigmas[:-1] = 1 - done / (done[-1] / (1 - terminal))
    return sigmas


def linear_quadratic(
    steps: int,
    *,
    threshold: float = 0.025,  # how far below 1 the linear part ends
    linear_steps: int | None = None,  # default: half of them
) -> Tensor:
    """Small even steps near pure noise, then growing ones (Movie Gen, arXiv:2410.13720)."""
    _check_steps(steps)
    if steps == 1:
        return torch.tensor([1.0, 0.0])
    linear = steps // 2 if linear_steps is None else linear_steps
    if not 0 < linear < steps:
        raise InputError(f"linear_steps must be 1 to {steps - 1} of {steps} steps; got {linear}")
    quadratic = steps - linear
    # The quadratic meets the line at step `linear`, with its slope, and reaches 1 at step `steps`.
    excess = linear - threshold * steps
    a = excess / (linear * quadratic**2)
    b = threshold / linear - 2 * excess / quadratic**2
    c = a * linear**2
    i = torch.arange(steps, dtype=torch.float64)
    done = torch.where(i < linear, i * threshold / linear, a * i**2 + b * i + c)
    return (1 - torch.cat((done, done.new_ones(1)))).float()


def beta(
    steps: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    shift: float = 2.37,  # log of the shift of the underlying table
    table_size: int = 10000,
) -> Tensor:
    """Levels at quantiles of a Beta distribution (Lee et al. 2024, arXiv:2407.12173).

    Both ends are sampled more densely. Quantiles that fall on one table entry are merged, so many
    steps may give fewer.
    """
    _check_steps(steps)
    quantiles = betaincinv(alpha, beta, 1 - np.arange(steps) / steps)
    indices = np.rint(quantiles * (table_size - 1)).astype(np.int64)
    u = (np.array(list(dict.fromkeys(indices.tolist()))) + 1) / table_size
    sigmas = math.exp(shift) / (math.exp(shift) + 1 / u - 1)
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32)


def karras(
    steps: int,
    *,
    sigma_min: float = 0.002,  # variance-exploding, as in the paper
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """EDM spacing (Karras et al. 2022, arXiv:2206.00364, eq. 5), mapped to the flow path.

    Starts below 1: noise the first latent with `sigmas[0]`.
    """
    _check_steps(steps)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    s = (high + ramp * (low - high)) ** rho
    return torch.cat((s / (1 + s), s.new_zeros(1))).float()


SCHEDULES = {
    "shifted": shifted,
    "linear-quadratic": linear_quadratic,
    "beta": beta,
    "karras": karras,
}


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
