"""Golden sampler steps and loops, with the closed-form denoiser that the cases spell out."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from aiprod_core.components import samplers
from aiprod_core.components.conditioning import keep_conditions
from aiprod_core.model.transformer import denoised_from_velocity
from aiprod_core.parity.case import Case
from aiprod_core.types import AV, LatentState


def run(case: Case) -> dict[str, Tensor]:
    if case.name.startswith("loop-"):
        return _loop(case)
    return _single_steps(case)


def _loop(case: Case) -> dict[str, Tensor]:
    params = case.params
    x = AV(case.optional_input("video.latent"), case.optional_input("audio.latent"))
    video, audio = _state(case, "video"), _state(case, "audio")
    mask = AV(
        None if video is None else video.denoise_mask,
        None if audio is None else audio.denoise_mask,
    )
    sigmas = case.input("sigmas")
    common: dict[str, Any] = {
        "blend": keep_conditions(video, audio),
        "noise_sampler": _given_noise(case),
    }
    name = case.name.removeprefix("loop-")
    if name.startswith("res2s"):
        is_masked = not params.get("legacy_mode", True)
        out = samplers.res_2s(
            _denoise,
            x,
            sigmas,
            eta=params.get("eta", 0.5),
            refine_anchor=params.get("bongmath", True),
            mask=mask if is_masked else None,
            **common,
        )
    elif name.startswith("gradient-estimation"):
        gamma = params.get("ge_gamma", 2.0)
        out = samplers.gradient_estimation(_denoise, x, sigmas, gamma=gamma, **common)
    elif name.startswith("euler-cfg-pp"):
        eta = params.get("eta", 1.0)
        out = samplers.euler_cfg_pp(
            lambda x, sigma: (_denoise(x, sigma), _uncond(x, sigma)), x, sigmas, eta=eta, **common
        )
    elif name.startswith("euler-ancestral"):
        eta = params.get("eta", 1.0)
        out = samplers.euler_ancestral(_denoise, x, sigmas, eta=eta, **common)
    else:
        out = samplers.euler(_denoise, x, sigmas, **common)
    return {f"out.{name}": value for name, value in vars(out).items() if value is not None}


def _single_steps(case: Case) -> dict[str, Tensor]:
    def alone(tensor: Tensor) -> AV:
        return AV(video=tensor)

    x, denoised = alone(case.input("sample")), alone(case.input("denoised"))
    uncond, noise = alone(case.input("uncond_denoised")), alone(case.input("noise"))
    sigmas = case.input("sigmas").tolist()
    # to_denoised takes the third tensor for a velocity.
    got: dict[str, Tensor] = {
        "out.velocity": (case.input("sample") - case.input("denoised")) / 0.725,
        "out.to_denoised": denoised_from_velocity(
            case.input("sample"), case.input("uncond_denoised"), torch.tensor(0.725)
        ),
    }
    if (h := case.optional_input("res2s.h")) is not None:
        rows = [samplers.res_2s_coefficients(value) for value in h.tolist()]
        got["out.res2s.a21_b1_b2"] = torch.tensor(rows, dtype=torch.float64)
        phis = [(samplers.phi1(-value), samplers.phi2(-value)) for value in h.tolist()]
        got["out.res2s.phi"] = torch.tensor(phis, dtype=torch.float64)
    for key in case.tensors:
        # out.STEPPER[.etaE].I: the update from sigma I to sigma I + 1.
        match = re.fullmatch(r"out\.([a-z0-9_]+?)(?:\.eta(\d+(?:\.\d+)?))?\.(\d+)", key)
        if key in got or not match:
            continue
        stepper, eta, index = match[1], float(match[2] or 1.0), int(match[3])
        sigma, sigma_next = sigmas[index], sigmas[index + 1]
        if stepper == "euler":
            step = samplers.euler_step(x, denoised, sigma, sigma_next)
        elif stepper == "euler_ancestral":
            step = samplers.ancestral_step(x, denoised, sigma, sigma_next, noise, eta)
        elif stepper == "euler_cfg_pp":
            step = samplers.cfg_pp_step(x, denoised, uncond, sigma, sigma_next, noise, eta)
        else:
            step = x.map(
                lambda x, y, e, s=sigma, n=sigma_next, eta=eta: samplers.renoise_step(
                    x, y, s, n, e, eta
                ),
                denoised,
                noise,
            )
        assert step.video is not None
        got[key] = step.video
    return got


def _state(case: Case, modality: str) -> LatentState | None:
    latent = case.optional_input(f"{modality}.latent")
    if latent is None:
        return None
    return LatentState(
        latent=latent,
        clean_latent=case.input(f"{modality}.clean"),
        denoise_mask=case.input(f"{modality}.denoise_mask"),
        positions=torch.zeros(latent.shape[0], 1, latent.shape[1], 2),
    )


def _given_noise(case: Case) -> samplers.NoiseSampler:
    """The case's draws in their order: video, then audio, each time."""
    draws = iter(sorted(key for key in case.tensors if key.startswith("in.noise.")))
    return lambda x: x.map(lambda _: case.tensors[next(draws)])


def _denoise(x: AV, sigma: float) -> AV:
    def estimate(latent: Tensor, phase: float) -> Tensor:
        return 0.6 * torch.tanh(latent) * (1 - 0.5 * sigma) + 0.2 * math.cos(3 * sigma + phase)

    return AV(
        None if x.video is None else estimate(x.video, 0.0),
        None if x.audio is None else estimate(x.audio, 1.0),
    )


def _uncond(x: AV, sigma: float) -> AV:
    return x.map(lambda latent: 0.5 * torch.tanh(0.8 * latent) * (1 - 0.3 * sigma))
