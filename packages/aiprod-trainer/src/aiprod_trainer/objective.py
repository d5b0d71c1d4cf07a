"""The flow-matching objective for video and sound together.

noisy = (1 - sigma) clean + sigma noise; the network predicts the velocity noise - clean (Lipman et
al., 2023). Each modality has its own noise level: most of the time they share one, as in sampling;
else they are drawn apart, or one of them is clean, which is what teaches sound to follow a picture
and a picture to follow sound.

Letters: B batch, N tokens, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aiprod_core.types import Modality


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
