"""Quantisation of a transformer while it is loaded, by the name of a scheme.

    fp8             8-bit floats, widened at every call: half the memory of bfloat16
    fp8-scaled-mm   8-bit floats multiplied as such (Ada, Hopper), inputs scaled on the way
    int8            8-bit integers with a scale a row
    int4            4-bit integers with a scale and zero for 64 columns: a good quarter of bfloat16

`storing` is handed to `load_module` and turns each weight into its quantised layer as soon as it is
read, so that at no time more than one weight is in memory at full precision.
"""

from collections.abc import Callable

from torch import Tensor, nn

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import assign
from aiprod_core.quantization.fp8 import (
    FP8,
    Fp8CastLinear,
    Fp8ScaledLinear,
    is_cast_target,
    to_fp8,
)
from aiprod_core.quantization.weight_only import Int4Linear, Int8Linear, group_size

SCHEMES: dict[str, Callable[[Tensor, Tensor | None], nn.Module]] = {
    "fp8": Fp8CastLinear,
    "fp8-scaled-mm": Fp8ScaledLinear.quantized,
    "int8": Int8Linear,
    "int4": Int4Linear,
}

# Bytes a weight takes in a quantised layer, scales included.
WEIGHT_BYTES = {"fp8": 1.0, "fp8-scaled-mm": 1.0, "int8": 1.0, "int4": 0.5 + 8 / 64}


def check_scheme(name: str) -> str:
    """The scheme's name; LTX-2's `fp8-cast` is `fp8`. Raises InputError for an unknown one."""
    name = "fp8" if name == "fp8-cast" else name
    if name not in SCHEMES:
        raise InputError(f"quantization must be one of {', '.join(SCHEMES)}; got {name}, try fp8.")
    return name


def storing(scheme: str) -> Callable[[nn.Module, str, Tensor], None]:
    """`assign` for `load_module`: the blocks' large linears become the scheme's."""
    quantize = SCHEMES[scheme]

    def store(module: nn.Module, name: str, tensor: Tensor) -> None:
        layer_name, _, leaf = name.rpartition(".")
        layer = module.get_submodule(layer_name)
        is_weight = leaf == "weight" and is_cast_target(layer_name)
        if is_weight and isinstance(layer, nn.Linear) and _is_worth_it(scheme, tensor):
            # The bias is still on the meta device and comes next.
            module.set_submodule(layer_name, quantize(tensor, layer.bias))
            return
        placeholder = layer._parameters.get(leaf)
        if placeholder is not None and placeholder.dtype == FP8:
            tensor = to_fp8(tensor)
        assign(module, name, tensor)

    return store


def _is_worth_it(scheme: str, weight: Tensor) -> bool:
    return scheme != "int4" or group_size(weight.shape[1]) >= 8
