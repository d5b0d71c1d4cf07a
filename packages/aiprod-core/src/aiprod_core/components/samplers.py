"""Samplers: functions from noise to a clean latent along a table of sigmas.

Each takes `(denoise, x, sigmas)` and returns x. `denoise(x, sigma)` is the guided model: the clean
estimate ("denoised") of x at noise level sigma, a float. x is an `AV`: video and audio step
together, and an absent modality stays None. Keyword arguments common to all:

    generator       source of random numbers; samplers that draw none leave it alone
    noise_sampler   draws standard normal noise like its argument, instead of the generator
    blend           puts conditioned tokens back: x mask + clean (1 - mask); see `keep_conditions`
    callback        called as (step, sigma, x, denoised) once a step

The state is kept in float32 (float64 if given so) whatever the model computes in: a bfloat16 state
would lose the small steps near pure noise. On the flow path x = (1 - sigma) clean + sigma noise,
so alpha = 1 - sigma, and the ODE is dx/dsigma = (x - denoised) / sigma.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from aiprod_core.types import AV

Denoise = Callable[[AV, float], AV]
NoiseSampler = Callable[[AV], AV]
Blend = Callable[[AV], AV]
Callback = Callable[[int, float, AV, AV], None]


def _identity(x: AV) -> AV:
    return x


def ignore_step(step: int, sigma: float, x: AV, denoised: AV) -> None:
    """The callback that does nothing."""


# -------------------------------------------------------------------------------------- first order


def euler(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """Euler's method."""
    x = x.map(_at_least_float32)
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = blend(denoise(x, sigma))
        callback(step, sigma, x, denoised)
        x = euler_step(x, denoised, sigma, sigma_next)
    return x


def euler_step(x: AV, denoised: AV, sigma: float, sigma_next: float) -> AV:
    velocity = (x - denoised) / sigma
    return x + velocity * (sigma_next - sigma)


def euler_ancestral(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    eta: float = 1.0,  # share of the step's noise that is drawn anew; 0 is Euler
    s_noise: float = 1.0,  # multiplier of the drawn noise
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """Euler to below the next sigma, then noise back up to it; the flow form of k-diffusion's."""
    x = x.map(_at_least_float32)
    noise_sampler = noise_sampler or gaussian(generator)
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = blend(denoise(x, sigma))
        callback(step, sigma, x, denoised)
        if sigma_next == 0:
            x = denoised
        else:
            noise = noise_sampler(x)
            x = blend(ancestral_step(x, denoised, sigma, sigma_next, noise, eta, s_noise))
    return x


def ancestral_step(
    x: AV,
    denoised: AV,
    sigma: float,
    sigma_next: float,
    noise: AV,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> AV:
    if sigma_next == 0:
        return denoised
    sigma_down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    x = euler_step(x, denoised, sigma, sigma_down)
    # Scaled so that the clean part has weight 1 - sigma_next again, then topped up with noise.
    scale = (1 - sigma_next) / (1 - sigma_down)
    sigma_up = math.sqrt(max(0.0, sigma_next**2 - (scale * sigma_down) ** 2))
    return x * scale + noise * (s_noise * sigma_up)


def euler_cfg_pp(
    denoise: Callable[[AV, float], tuple[AV, AV]],
    x: AV,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """CFG++ (Chung et al. 2024, arXiv:2406.08070): guidance that leaves the noise alone.

    `denoise` returns the guided and the unconditional estimate (`GuidedDenoiser.with_uncond`).
    """
    x = x.map(_at_least_float32)
    noise_sampler = noise_sampler or gaussian(generator)
    for step, sigma, sigma_next in _steps(sigmas):
        denoised, uncond = denoise(x, sigma)
        denoised = blend(denoised)
        callback(step, sigma, x, denoised)
        if sigma_next == 0:
            x = denoised
        else:
            noise = noise_sampler(x)
            x = blend(cfg_pp_step(x, denoised, uncond, sigma, sigma_next, noise, eta, s_noise))
    return x


def cfg_pp_step(
    x: AV,
    denoised: AV,
    uncond: AV,
    sigma: float,
    sigma_next: float,
    noise: AV,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> AV:
    if sigma_next == 0:
        return denoised
    alpha, alpha_next = 1 - sigma, 1 - sigma_next
    predicted_noise = (x - uncond * alpha) / sigma
    # Ancestral split in the variance-exploding sigmas s = sigma / alpha; s is infinite at sigma 1.
    s_next = sigma_next / alpha_next
    ratio = s_next * alpha / sigma  # s_next / s
    up = min(s_next, eta * s_next * math.sqrt(max(0.0, 1 - ratio**2)))
    down = math.sqrt(s_next**2 - up**2)
    return (denoised + predicted_noise * down + noise * (up * s_noise)) * alpha_next


def ddim(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    eta: float = 0.0,  # 0 deterministic (then it is Euler), 1 the posterior of DDPM
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16) with alpha = 1 - sigma."""
    x = x.map(_at_least_float32)
    noise_sampler = noise_sampler or gaussian(generator)
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = blend(denoise(x, sigma))
        callback(step, sigma, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        predicted_noise = (x - denoised * (1 - sigma)) / sigma
        snr_ratio = (1 - sigma) / sigma * sigma_next / (1 - sigma_next)  # e^-h, 0 at sigma 1
        sigma_up = min(eta * math.sqrt(1 - snr_ratio**2), 1.0) * sigma_next
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x = denoised * (1 - sigma_next) + predicted_noise * sigma_down
        if eta > 0:
            x = blend(x + noise_sampler(x) * sigma_up)
    return x


def gradient_estimation(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    gamma: float = 2.0,  # 1 is Euler
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """Euler on a velocity extrapolated from the last two (Permenter & Yuan, arXiv:2306.04848)."""
    x = x.map(_at_least_float32)
    velocity_last: AV | None = None
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = blend(denoise(x, sigma))
        callback(step, sigma, x, denoised)
        if sigma_next == 0:
            return denoised
        velocity = (x - denoised) / sigma
        estimate = velocity
        if velocity_last is not None:
            estimate = velocity_last + (velocity - velocity_last) * gamma
        x = x + estimate * (sigma_next - sigma)
        velocity_last = velocity
    return x


# ------------------------------------------------------------------------------------- second order


def heun(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """Heun's method (Karras et al. 2022, arXiv:2206.00364, Alg. 1) on the flow path.

    Two model calls a step, one in the last.
    """
    x = x.map(_at_least_float32)
    for step, sigma, sigma_next in _steps(sigmas):
        # Euler step.
        denoised = blend(denoise(x, sigma))
        callback(step, sigma, x, denoised)
        velocity = (x - denoised) / sigma
        x_next = x + velocity * (sigma_next - sigma)
        # 2nd order correction.
        if sigma_next > 0:
            velocity_next = (x_next - blend(denoise(x_next, sigma_next))) / sigma_next
            x_next = x + (velocity + velocity_next) * (0.5 * (sigma_next - sigma))
        x = x_next
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Alg. 2), alpha = 1 - sigma.

    Second order from the memory of the last estimate. The first and the last step are first order,
    which on the flow path is Euler.
    """
    return dpmpp_2m_sde(
        denoise,
        x,
        sigmas,
        eta=0.0,
        blend=blend,
        callback=callback,
        noise_sampler=noise_sampler,
        generator=generator,
    )


def dpmpp_2m_sde(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    eta: float = 1.0,  # 0 is the ODE, that is DPM-Solver++(2M)
    s_noise: float = 1.0,
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, eq. 18), midpoint form.

    Its time is the half log-SNR, lambda = log((1 - sigma) / sigma). First and last step are Euler
    steps: lambda is infinite at sigma 1 and 0.
    """
    x = x.map(_at_least_float32)
    noise_sampler = noise_sampler or gaussian(generator)
    denoised_last: AV | None = None
    h_last = math.inf
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = blend(denoise(x, sigma))
        callback(step, sigma, x, denoised)
        h = _half_log_snr(sigma_next) - _half_log_snr(sigma)
        if denoised_last is None or sigma_next == 0:
            x = euler_step(x, denoised, sigma, sigma_next)
        else:
            # Extrapolate the estimate to the middle of the step.
            midpoint = denoised + (denoised - denoised_last) * (h / (2 * h_last))
            keep = sigma_next / sigma * math.exp(-eta * h)
            x = x * keep + midpoint * ((1 - sigma_next) * -math.expm1(-(1 + eta) * h))
            if eta > 0:
                sigma_up = sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
                x = blend(x + noise_sampler(x) * (s_noise * sigma_up))
        denoised_last, h_last = denoised, h
    return x


def res_2s(
    denoise: Denoise,
    x: AV,
    sigmas: Tensor,
    *,
    eta: float = 0.5,  # share of noise drawn anew after each step; the substep's is always 0.5
    refine_anchor: bool = True,
    mask: AV | None = None,  # (B, N, 1): re-noise each token from mask sigma, in place of blending
    generator: torch.Generator | None = None,
    noise_sampler: NoiseSampler | None = None,
    blend: Blend = _identity,
    callback: Callback = ignore_step,
) -> AV:
    """Exponential Runge-Kutta of order 2 with one substep (RES, arXiv:2308.02157), as an SDE.

    Two model calls a step and one at the end, all arithmetic in float64. The substep draws from a
    second generator, seeded 10000 above the first.
    """
    dtype = next(v.dtype for v in (x.video, x.audio) if v is not None)
    dtype = torch.promote_types(dtype, torch.float32)
    noise_sampler = noise_sampler or standardised(generator)
    substep_noise_sampler = noise_sampler
    if generator is not None:
        seed = generator.initial_seed() + SUBSTEP_SEED_OFFSET
        substep_noise_sampler = standardised(torch.Generator(generator.device).manual_seed(seed))

    def renoise(x: AV, y: AV, sigma: float, sigma_next: float, noise: AV, eta: float) -> AV:
        if mask is not None:
            return x.map(
                lambda x, y, noise, mask: renoise_step(
                    x, y, mask.double() * sigma, mask.double() * sigma_next, noise, eta
                ),
                y,
                noise,
                mask,
            )
        return blend(x.map(lambda x, y, e: renoise_step(x, y, sigma, sigma_next, e, eta), y, noise))

    def estimate(x: AV, sigma: float) -> AV:
        return blend(denoise(x.map(lambda v: v.to(dtype)), sigma)).map(Tensor.double)

    levels = [float(sigma) for sigma in sigmas]
    if levels[-1] == 0:
        levels = [*levels[:-1], RES_2S_LAST_SIGMA]
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        anchor = x.map(Tensor.double)
        sigma_mid = math.sqrt(sigma * sigma_next)
        h = math.log(sigma / sigma_next)
        a21, b1, b2 = res_2s_coefficients(h)
        # Substep.
        denoised = estimate(x, sigma)
        callback(step, sigma, x, denoised)
        x_mid = anchor + (denoised - anchor) * (h * a21)
        x_mid = renoise(anchor, x_mid, sigma, sigma_mid, substep_noise_sampler(x), 0.5)
        if refine_anchor and h < 0.5 and sigma > 0.03:
            # The anchor from which the substep would have led to x_mid without noise: where the
            # usual 100 rounds of anchor <- x_mid - c (denoised - anchor) end, as c < 1/4.
            c = h * a21
            anchor = (x_mid - denoised * c) / (1 - c)
        # Full step, from the estimates at both ends of the substep.
        denoised_mid = estimate(x_mid, sigma_mid)
        x_next = anchor + ((denoised - anchor) * b1 + (denoised_mid - anchor) * b2) * h
        x_next = renoise(anchor, x_next, sigma, sigma_next, noise_sampler(x), eta)
        x = x_next.map(lambda v: v.to(dtype))
    # The last level is not quite clean.
    return estimate(x, levels[-1]).map(lambda v: v.to(dtype))


RES_2S_LAST_SIGMA = 0.0011  # stands before the final 0, where log sigma would be infinite
SUBSTEP_SEED_OFFSET = 10_000


def res_2s_coefficients(h: float) -> tuple[float, float, float]:
    """a21, b1, b2 of the two-stage exponential method with c2 = 1/2, for a step h in log sigma."""
    a21 = phi1(-h / 2) / 2
    b2 = 2 * phi2(-h)
    return a21, phi1(-h) - b2, b2


def phi1(z: float) -> float:
    return math.expm1(z) / z


def phi2(z: float) -> float:
    if abs(z) < 1e-4:  # expm1(z) - z would cancel
        return 0.5 + z / 6 + z**2 / 24
    return (math.expm1(z) - z) / z**2


def renoise_step(
    x: Tensor,
    y: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise: Tensor,
    eta: float,
) -> Tensor:
    """Replaces part of the noise in y, which a step led from x at `sigma` to `sigma_next`.

    The noise that y implies is read off the line from x. Returns y where `sigma_next` is 0, and for
    per-token sigmas as soon as one token's is: such a modality stays deterministic.
    """
    if bool(torch.as_tensor(sigma_next).eq(0).any()):
        return y
    up = sigma_next * min(eta, 0.9999)
    residual = (sigma_next**2 - up**2) ** 0.5
    ratio = 1 - sigma_next + residual
    predicted_noise = (x - y) / (sigma - sigma_next)
    clean = x - predicted_noise * sigma
    return (clean + predicted_noise * (residual / ratio)) * ratio + noise * up


SAMPLERS = {
    "euler": euler,
    "euler-ancestral": euler_ancestral,
    "ddim": ddim,
    "gradient-estimation": gradient_estimation,
    "heun": heun,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-2m-sde": dpmpp_2m_sde,
    "res-2s": res_2s,
}


# -------------------------------------------------------------------------------------------- parts


def gaussian(generator: torch.Generator | None) -> NoiseSampler:
    """Standard normal noise, video then audio, drawn on the generator's device.

    So a CPU generator gives one result on every device.
    """

    def draw(like: Tensor) -> Tensor:
        device = generator.device if generator is not None else like.device
        noise = torch.randn(
            like.shape, generator=generator, device=device, dtype=_at_least_float32(like).dtype
        )
        return noise.to(like.device)

    return lambda x: x.map(draw)


def standardised(generator: torch.Generator | None) -> NoiseSampler:
    """float64 normal noise of exact mean 0 and deviation 1: of the whole, then of each sample."""

    def draw(like: Tensor) -> Tensor:
        noise = gaussian(generator)(AV(video=like.double())).video
        assert noise is not None
        noise = (noise - noise.mean()) / noise.std()
        mean, std = noise.mean((-2, -1), keepdim=True), noise.std((-2, -1), keepdim=True)
        return (noise - mean) / std

    return lambda x: x.map(draw)


def _steps(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """(step, sigma, sigma_next) as plain floats: read once, so that steps do not wait on a GPU."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        yield step, sigma, sigma_next


def _half_log_snr(sigma: float) -> float:
    if sigma <= 0 or sigma >= 1:
        return math.inf if sigma <= 0 else -math.inf
    return math.log((1 - sigma) / sigma)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
