"""How latents are normalised for the transformer."""

import pytest
import torch
from torch import nn

from aiprod_trainer.export import channel_scales


def test_channels_are_scaled_by_the_root_of_what_they_change_in_the_picture():
    decoder = nn.Conv3d(3, 3, 1, bias=False)
    with torch.no_grad():
        decoder.weight.copy_(torch.diag(torch.tensor([1.0, 4.0, 0.0]))[..., None, None, None])
    latents = torch.randn(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    latents /= latents.std(dim=(0, 2, 3, 4), keepdim=True)
    scales = channel_scales(decoder, latents).detach()
    assert scales[1] / scales[0] == pytest.approx(2.0, rel=0.01)
    assert scales[2] == pytest.approx(0.2)  # a channel that shows nowhere is not lost entirely
    assert scales[:2].square().sum().item() / 3 == pytest.approx(1.0, rel=0.01)
