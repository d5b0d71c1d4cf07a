"""The flow-matching objective: noise levels, targets and what is left out of the loss."""

import torch

from aiprod_trainer.objective import noise_tokens, pair_sigmas, sample_sigmas, velocity_loss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noised(sigma, given=None):
    clean = torch.randn(len(sigma), 6, 4, generator=generator(1))
    positions, context = torch.zeros(len(sigma), 3, 6, 2), torch.zeros(len(sigma), 2, 8)
    return clean, noise_tokens(clean, sigma, positions, context, generator(2), given=given)


def test_one_exact_step_along_the_target_velocity_reaches_the_clean_tokens():
    sigma = torch.tensor([0.1, 0.5, 0.99])
    clean, example = noised(sigma)
    denoised = example.modality.latent - example.target * sigma[:, None, None]
    assert torch.allclose(denoised, clean, atol=1e-5)


def test_given_tokens_stay_clean_and_out_of_the_loss():
    given = torch.zeros(2, 6, 1)
    given[:, :2] = 1
    clean, example = noised(torch.tensor([0.7, 0.9]), given)
    assert torch.equal(example.modality.latent[:, :2], clean[:, :2])
    assert (example.modality.timesteps[:, :2] == 0).all()
    wrong_on_given = example.target.clone()
    wrong_on_given[:, :2] += 100
    assert velocity_loss(wrong_on_given, example) == 0


def test_a_clean_modality_has_no_loss_and_does_not_divide_by_zero():
    _, example = noised(torch.zeros(2))
    assert velocity_loss(torch.ones_like(example.target), example) == 0


def test_the_shift_moves_draws_towards_noise():
    low = sample_sigmas(4000, generator(), shift=0.0, shifted_share=1.0)
    high = sample_sigmas(4000, generator(), shift=1.2, shifted_share=1.0)
    assert abs(low.mean() - 0.5) < 0.02
    assert high.mean() > 0.68


def test_pairs_are_equal_apart_or_half_clean_in_the_given_shares():
    video, audio = pair_sigmas(
        8000, generator(), shift=1.0, shifted_share=0.5, joint_share=0.5, clean_share=0.2
    )
    is_joint = (video == audio).float().mean()
    is_clean = ((video == 0) ^ (audio == 0)).float().mean()
    assert abs(is_joint - 0.5) < 0.03
    assert abs(is_clean - 0.2) < 0.03
    assert abs((video == 0).float().mean() - 0.1) < 0.02
