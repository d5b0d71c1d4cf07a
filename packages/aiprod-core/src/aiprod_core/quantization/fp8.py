"""Linear layers with 8-bit floating-point weights (float8_e4m3fn), swapped in from outside.

Two kinds, told apart by what the file holds:

* Cast: weights and biases are stored in 8 bits and widened to the activations' type at every call.
  Half the memory of bfloat16, the arithmetic is unchanged. Any checkpoint can be cast; a file that
  was quantised with a scale has the scale folded into the weight first.
* Scaled: activations are quantised too and the product runs on the 8-bit matrix units. The scale of
  a layer's input is the file's (`input_scale`), or the input's own largest value where the weights
  were quantised here. Where there are no such units, the same rounded numbers are multiplied in
  float32: slower, same result up to the order of summation.

e4m3fn has a sign, 4 exponent and 3 mantissa bits, no infinity, and ends at 448. The casts clamp,
because PyTorch's turns what is larger into NaN.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError
from aiprod_core.quantization.weight_only import QuantizedLinear

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_NORMAL_EXPONENT = -6
MANTISSA_BITS = 3

# The large linears of every block, for both modalities and between them; gates and norms stay.
CAST_SUFFIXES = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def is_cast_target(name: str) -> bool:
    """Whether the linear layer of this name in a transformer is one that fp8 casting covers."""
    return name.startswith("transformer_blocks.") and name.endswith(CAST_SUFFIXES)


def cast_linears(transformer: nn.Module) -> None:
    """Replaces the blocks' linears by `Fp8CastLinear`, in place."""
    for name, linear in list(transformer.named_modules()):
        if isinstance(linear, nn.Linear) and is_cast_target(name):
            transformer.set_submodule(name, Fp8CastLinear(linear.weight, linear.bias))


def adopt_fp8_weights(
    transformer: nn.Module, scales: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Makes a module usable whose linears were just filled with a file's fp8 weights, in place.

    `scales` maps "LAYER.weight_scale" and "LAYER.input_scale" to scalars. A layer with both becomes
    `Fp8ScaledLinear`. Otherwise a weight scale is folded in, and the layer becomes `Fp8CastLinear`,
    or a plain one in `dtype` where casting does not cover it. Raises CheckpointError for scales
    that are not scalars.
    """
    for name, scale in scales.items():
        if scale.numel() != 1:
            raise CheckpointError(
                f"{name} has shape {list(scale.shape)}; only one scale a layer is supported"
            )
    for name, linear in list(transformer.named_modules()):
        if not isinstance(linear, nn.Linear) or linear.weight.dtype != FP8:
            continue
        weight_scale = scales.get(f"{name}.weight_scale")
        input_scale = scales.get(f"{name}.input_scale")
        if weight_scale is not None and input_scale is not None:
            scaled = Fp8ScaledLinear(linear.weight, linear.bias, weight_scale, input_scale)
            transformer.set_submodule(name, scaled)
            continue
        weight = linear.weight
        if weight_scale is not None:
            weight = (weight.float() * weight_scale.to(weight.device).float()).bfloat16()
        if is_cast_target(name):
            transformer.set_submodule(name, Fp8CastLinear(weight, linear.bias))
        else:
            linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)


class Fp8CastLinear(QuantizedLinear):
    """`x W^T + b` with both stored in fp8 and widened to x's type at every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._describe(weight, None if bias is None else to_fp8(bias))
        self.weight = nn.Parameter(to_fp8(weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def dense_weight(self) -> Tensor:
        return self.weight.to(torch.bfloat16)

    def set_dense_weight(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """Stores a new weight; with a generator it is rounded at random, right on average."""
        rounded = to_fp8(weight) if generator is None else round_stochastically(weight, generator)
        self.weight.data = rounded


class Fp8ScaledLinear(QuantizedLinear):
    """`x W^T + b` with x and W both in fp8, each with one scale; b in its own precision.

    weight (out, in) in fp8 stands for `weight * weight_scale`; the input is divided by
    `input_scale`, measured when the file was made, and clamped. Without one it is divided so that
    its own largest value ends fp8's range.
    """

    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._describe(weight, bias)
        self.weight = nn.Parameter(weight, requires_grad=False)
        # Scales stay float32 0-d tensors: bfloat16 would shift every output by up to 0.4%.
        scales = [
            None if scale is None else scale.to(weight.device).float().reshape(())
            for scale in (weight_scale, input_scale)
        ]
        self.register_buffer("weight_scale", scales[0])
        self.register_buffer("input_scale", scales[1])

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None) -> "Fp8ScaledLinear":
        """From a weight at full precision; inputs are scaled by what they are."""
        scale = weight_scale_of(weight)
        return cls(to_fp8(weight.float() / scale), bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        input_scale = self.input_scale
        if input_scale is None:
            input_scale = weight_scale_of(x)
        return self.product(to_fp8(x.float() / input_scale), input_scale, x.dtype)

    def product(self, x: Tensor, input_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """For inputs that are divided by their scale and in fp8 already; the result in `dtype`."""
        rows = x.flatten(0, -2)
        if has_scaled_matmul(x.device, self.weight):
            out = torch.ops.aten._scaled_mm(
                rows,
                self.weight.t(),
                scale_a=input_scale,
                scale_b=self.weight_scale,
                out_dtype=dtype,
            )
        else:
            out = scaled_matmul(rows, self.weight, input_scale, self.weight_scale).to(dtype)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out.unflatten(0, x.shape[:-1])

    def dense_weight(self) -> Tensor:
        return self.weight.float() * self.weight_scale

    def set_dense_weight(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """Stores a new weight with a new scale."""
        scale = weight_scale_of(weight)
        scaled = weight.float() / scale
        self.weight.data = (
            to_fp8(scaled) if generator is None else round_stochastically(scaled, generator)
        )
        self.weight_scale = scale


def scaled_matmul(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Reference for `torch._scaled_mm`: x (rows, in), weight (out, in), both fp8 -> float32."""
    return F.linear(x.float(), weight.float()) * (x_scale * weight_scale)


def has_scaled_matmul(device: torch.device, weight: Tensor) -> bool:
    """Ada and Hopper multiply fp8; their kernel wants both sides in multiples of 16."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 9)
        and all(size % 16 == 0 for size in weight.shape)
    )


def weight_scale_of(weight: Tensor) -> Tensor:
    """The scale that puts the largest weight at the end of fp8's range."""
    return weight.abs().max().float().clamp(min=torch.finfo(torch.float32).tiny) / FP8_MAX


def to_fp8(x: Tensor) -> Tensor:
    """Rounds to the nearest; clamped to the range."""
    return x if x.dtype == FP8 else x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds up or down with the odds that keep the average.

    Small additions, as LoRAs make, would vanish in rounding to the nearest of 8 bits.
    """
    x = x.float().clamp(-FP8_MAX, FP8_MAX)
    exponent = torch.frexp(x).exponent - 1
    # Below the smallest normal number the steps no longer shrink.
    exponent = exponent.clamp(min=SMALLEST_NORMAL_EXPONENT)
    step = torch.ldexp(torch.ones_like(x), exponent - MANTISSA_BITS)
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    return to_fp8(torch.floor(x / step + noise) * step)
