"""Golden cases of fp8 weights: cast from a full-precision file, and folded from a quantised one."""

import torch
from torch import Tensor

from aiprod_core.loader.networks import load_transformer
from aiprod_core.parity.case import Case
from aiprod_core.parity.transformer import read_modality
from aiprod_core.quantization.fp8 import FP8, cast_linears


def run(case: Case) -> dict[str, Tensor | list[str]]:
    transformer = load_transformer(case.checkpoint, dtype=torch.float32)
    if not case.checkpoint.is_fp8:
        cast_linears(transformer)
    out: dict[str, Tensor | list[str]] = {}
    if "fp8_tensors" in case.params:
        state = transformer.state_dict()
        out["params.fp8_tensors"] = sorted(name for name in state if state[name].dtype == FP8)
    video, audio = transformer(read_modality(case, "video"), read_modality(case, "audio"))
    out |= {"out.video": video, "out.audio": audio}
    prefix = "out.weight."
    for key in case.tensors:
        if key.startswith(prefix):
            out[key] = transformer.get_parameter(f"{key.removeprefix(prefix)}.weight").float()
    return out
