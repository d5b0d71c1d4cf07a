"""Convolutions of sound on a CPU, with channels last.

Channels first, oneDNN brings a picture's values into blocks before and out of them after every
convolution, which shows where channels are few: of a waveform, which is a picture of height 1, 16
channels, 31,520 samples and 3 taps take 0.5 to 0.6 ms so and 0.3 to 0.4 ms with channels last (AMD
Zen 4, two threads). What is computed between convolutions keeps the layout.

The autoencoder's convolutions follow the layout of their weights by themselves. Those of a plain
vocoder have one axis, for which PyTorch knows no such layout; with gradients on, and in 16 bits,
they compute as ever.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST = torch.channels_last


def put_channels_last(layer: nn.Conv1d | nn.ConvTranspose1d) -> None:
    """Rearranges the weights in memory, as `module.to(memory_format=...)` does those of 2 axes."""
    weight = layer.weight.data[:, :, None].contiguous(memory_format=LAST)
    layer.weight.data = weight.squeeze(2)


def conv1d(layer: nn.Conv1d | nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """The layer for x (B, C, L), whose result lies in memory as (B, L, C)."""
    if torch.is_grad_enabled() or x.dtype != torch.float32:
        return type(layer).forward(layer, x)  # pyright: ignore[reportArgumentType]
    picture, weight = x[:, :, None].contiguous(memory_format=LAST), layer.weight[:, :, None]
    sizes: dict[str, Any] = {
        name: (first, *getattr(layer, name))  # of the axis of one value, then of time
        for name, first in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    if isinstance(layer, nn.ConvTranspose1d):
        sizes["output_padding"] = (0, *layer.output_padding)
        out = F.conv_transpose2d(picture, weight, layer.bias, groups=layer.groups, **sizes)
    else:
        out = F.conv2d(picture, weight, layer.bias, groups=layer.groups, **sizes)
    return out.squeeze(2)
