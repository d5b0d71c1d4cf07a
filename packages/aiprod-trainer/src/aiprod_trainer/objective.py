"""The flow-matching objective for video and sound together.

noisy = (1 - sigma) clean + sigma noise; the network predicts the velocity noise - clean (Lipman et
al., 2023). Each modality has its own noise level: most of the time they share one, as in sampling;
else they are drawn apart, or one of them is clean, which is what teaches sound to follow a picture
and a picture to follow sound.

Letters: B batch, N tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aiprod_core.types import LatentState, Modality

# A schedule's log shift at 1024 and at 4096 tokens (arXiv:2403.03206, eq. 23, LTX-2's numbers).
MIN_SHIFT, MAX_SHIFT = 0.95, 2.05


@dataclass(frozen=True)
class Noised:
    """A training example of one modality: what the network gets, and what it should answer.

    target (B, N, C) velocity; weight (B, N or 1, 1), 0 on tokens given clean.
    """

    modality: Modality
    target: Tensor
    weight: Tensor


def sample_sigmas(
    count: int, generator: torch.Generator, *, shift: float, shifted_share: float
) -> Tensor:
    """(count,) noise levels, sigmoid(normal + shift): a clip's layout is decided at high noise.

    `shifted_share` of the draws use `shift`, the others 0.
    """
    is_shifted = torch.rand(count, generator=generator) < shifted_share
    return torch.sigmoid(torch.randn(count, generator=generator) + shift * is_shifted)


def pair_sigmas(
    count: int,
    generator: torch.Generator,
    *,
    shift: float,
    shifted_share: float,
    joint_share: float,
    clean_share: float,
) -> tuple[Tensor, Tensor]:
    """Video and audio noise levels (count,) each.

    `joint_share` of the pairs are equal, `clean_share` have one of the two at 0 (either with the
    same chance), the rest are independent.
    """
    draw = {"shift": shift, "shifted_share": shifted_share}
    video = sample_sigmas(count, generator, **draw)
    audio = sample_sigmas(count, generator, **draw)
    kind = torch.rand(count, generator=generator)
    is_joint = kind < joint_share
    is_clean = (kind >= joint_share) & (kind < joint_share + clean_share)
    coin = torch.rand(count, generator=generator) < 0.5
    audio = torch.where(is_joint, video, audio)
    return video * ~(is_clean & coin), audio * ~(is_clean & ~coin)


def noise_tokens(
    clean: Tensor,
    sigma: Tensor,
    positions: Tensor,
    context: Tensor,
    generator: torch.Generator,
    *,
    given: Tensor | None = None,
) -> Noised:
    """Noises tokens (B, N, C) at `sigma` (B,). `given` (B, N, 1) is 1 on tokens kept clean."""
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    denoise_mask = 1 if given is None else 1 - given
    timesteps = denoise_mask * sigma[:, None, None]  # (B, 1, 1) where no token is given
    noisy = torch.lerp(clean, noise, timesteps)
    weight = denoise_mask * (sigma > 0)[:, None, None]
    return Noised(Modality(noisy, sigma, timesteps, positions, context), noise - clean, weight)


def velocity_loss(velocity: Tensor, noised: Noised) -> Tensor:
    """Mean squared velocity error over the tokens that were noised; 0 where there are none."""
    squared = (velocity.float() - noised.target).square().mean(dim=-1, keepdim=True)
    weight = noised.weight.expand_as(squared)
    return (squared * weight).sum() / weight.sum().clamp_min(1)


# What follows serves `aiprod train`, where a sample's random numbers are its own: they do not
# depend on how a batch is spread over processes and accumulation steps.


def shift_for(num_tokens: int) -> float:
    """The mean of the logit of sigma: longer sequences are trained at more noise."""
    share = min(max((num_tokens - 1024) / (4096 - 1024), 0.0), 1.0)
    return MIN_SHIFT + share * (MAX_SHIFT - MIN_SHIFT)


def draw_sigmas(
    generators: Sequence[torch.Generator],
    *,
    shift: float | None,  # None: uniform
    uniform_share: float,
    joint_share: float,
    clean_share: float,
) -> tuple[Tensor, Tensor]:
    """Video and audio noise levels, one pair a generator.

    Each level is sigmoid(normal + shift), or with the chance `uniform_share` uniform in [0, 1).
    `joint_share` of the pairs are equal, `clean_share` have one of the two at 0.
    """

    def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        levels = torch.rand(2, generator=generator)
        logits = torch.randn(2, generator=generator)
        kind, coin, uniform = torch.rand(3, generator=generator)
        if shift is not None and uniform >= uniform_share:
            levels = torch.sigmoid(logits + shift)
        video, audio = levels
        if kind < joint_share:
            audio = video
        elif kind < joint_share + clean_share:
            video, audio = (video * 0, audio) if coin < 0.5 else (video, audio * 0)
        return video, audio

    video, audio = zip(*(pair(generator) for generator in generators), strict=True)
    return torch.stack(video), torch.stack(audio)


def noise_state(
    state: LatentState,
    sigma: Tensor,  # (B,)
    context: Tensor,  # (B, S, D)
    generators: Sequence[torch.Generator],  # one a sample
    *,
    num_tokens: int,  # the clip's own; conditions are appended after them
    is_uniform: bool,  # no token is given
) -> Noised:
    """Noises a stream's clean tokens as far as its conditions allow. All maths in float32."""
    clean = state.clean_latent
    shape = (num_tokens, clean.shape[2])
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(clean)
    noise = F.pad(noise, (0, 0, 0, clean.shape[1] - num_tokens))
    sigma = sigma.to(clean)
    levels = sigma[:, None, None]
    timesteps = levels if is_uniform else state.denoise_mask * levels
    modality = Modality(
        torch.lerp(clean, noise, timesteps),
        sigma,
        timesteps,
        state.positions[:1],  # samples share them
        context,
        attention_mask=state.attention_mask,
        keyframe_marker=state.keyframe_marker,
    )
    weight = (levels > 0) * (1 if is_uniform else state.denoise_mask)
    return Noised(modality, noise - clean, weight)


def flow_dpo_losses(
    better: dict[str, Tensor],  # (B,) velocity errors of each stream, as `sample_losses`
    worse: dict[str, Tensor],  # of the clip that is worse, under the same noise
    better_before: dict[str, Tensor],  # the same of the reference, the model before
    worse_before: dict[str, Tensor],
    beta: float,
) -> Tensor:
    """(B,) Flow-DPO losses: the better clip's velocity should gain on the reference's, the worse
    one's lose (Liu et al. 2025, arXiv:2501.13918, the objective L_FD with a constant beta):

        gain(c) = |v_c - v(x_c)|^2 - |v_c - v_ref(x_c)|^2
        loss = -log sigmoid(-beta / 2 (gain(better) - gain(worse)))

    Errors are means over tokens and channels and not sums, so beta is as much larger.
    """
    gains = [
        (better[name] - better_before[name]) - (worse[name] - worse_before[name]) for name in better
    ]
    return F.softplus(beta / 2 * torch.stack(gains).sum(dim=0))


def sample_losses(velocity: Tensor, noised: Noised) -> Tensor:
    """(B,) mean squared velocity error of each sample over its noised tokens; 0 without any."""
    squared = (velocity.float() - noised.target).square().mean(dim=-1, keepdim=True)
    weight = noised.weight.to(squared).expand_as(squared)
    return (squared * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp_min(1)
