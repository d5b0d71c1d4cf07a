"""Linear layers with integer weights: int8 with a scale a row, int4 with a scale and zero a group.

Weights are widened at every call and the product runs in the activations' type, so this saves
memory, not time. torchao has faster kernels for some of it, but none for float32 on a CPU, and
wants its own tensor types; these two are plain modules that LoRAs can be fused into.

Letters: out rows of a weight, in columns, G columns that share a scale.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantizedLinear(nn.Module, ABC):
    """What all quantised linears share: `weight` as stored, `bias`, and a way there and back."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight (out, in) that the stored one stands for."""

    @abstractmethod
    def set_dense_weight(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """Stores a new weight (out, in), rounded at random where there is a generator."""

    def _describe(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Int8Linear(QuantizedLinear):
    """`x W^T + b`; weight (out, in) int8 stands for `weight * weight_scale`, (out, 1) float32."""

    weight_scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._describe(weight, bias)
        self.weight = nn.Parameter(weight.new_empty(0, dtype=torch.int8), requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(0))
        self.set_dense_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        # Scaling the product's columns instead of the weight's rows; int8 is exact in bfloat16.
        out = F.linear(x, self.weight.to(x.dtype)) * self.weight_scale[:, 0].to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def dense_weight(self) -> Tensor:
        return self.weight.float() * self.weight_scale

    def set_dense_weight(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        weight = weight.float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
        # In place: a temporary of four bytes a weight, not four of them, while a model is loaded.
        numbers = rounded_(weight / scale, generator).clamp_(-127, 127)
        self.weight.data = numbers.to(torch.int8)
        self.weight_scale = scale


class Int4Linear(QuantizedLinear):
    """`x W^T + b`; weight (out, in / 2) uint8 holds two columns a byte, the even one low.

    A number q from 0 to 15 stands for `q * weight_scale + weight_zero`, (out, in / G) float32.
    G is 64, or the largest power of two that divides `in`.
    """

    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._describe(weight, bias)
        self.weight = nn.Parameter(weight.new_empty(0, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(0))
        self.register_buffer("weight_zero", torch.empty(0))
        self.set_dense_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight().to(x.dtype), bias)

    def dense_weight(self) -> Tensor:
        numbers = torch.stack((self.weight & 15, self.weight >> 4), dim=-1).flatten(1)  # (out, in)
        groups = numbers.float().unflatten(1, (self.weight_scale.shape[1], -1))
        return (groups * self.weight_scale[..., None] + self.weight_zero[..., None]).flatten(1)

    def set_dense_weight(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        groups = weight.float().unflatten(1, (-1, group_size(self.in_features)))  # (out, in/G, G)
        zero, top = groups.aminmax(dim=-1)
        scale = ((top - zero) / 15).clamp(min=1e-30)
        numbers = (groups - zero[..., None]).div_(scale[..., None])
        numbers = rounded_(numbers, generator).clamp_(0, 15).to(torch.uint8).flatten(1)  # (out, in)
        self.weight.data = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
        self.weight_scale, self.weight_zero = scale, zero


def group_size(in_features: int) -> int:
    """Columns that share a scale; below 8 it would not save anything."""
    return math.gcd(in_features, 64)


def rounded_(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """In place to the nearest whole number, or up or down with the odds that keep the average."""
    if generator is None:
        return x.round_()
    return x.add_(torch.rand(x.shape, generator=generator, device=x.device)).floor_()
