"""Golden cases of LoRA files: their metadata, fused weights, and the fused network's outputs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader.lora import fuse, open_lora
from aiprod_core.loader.networks import load_transformer
from aiprod_core.parity.case import Case
from aiprod_core.parity.transformer import read_modality

RULES = {"fp32": None, "bf16rule": torch.bfloat16}


def run(case: Case) -> dict[str, Any]:
    if "loras" not in case.params:
        return {f"params.{name}": reference_factors(case, name) for name in case.params}
    transformer = load_transformer(case.checkpoint, dtype=torch.float32)
    video, audio = read_modality(case, "video"), read_modality(case, "audio")
    adapters = [
        (open_lora(case.path(entry["file"])), entry["strength"]) for entry in case.params["loras"]
    ]
    out: dict[str, Tensor | None] = {}
    out["out.base.video"], out["out.base.audio"] = transformer(video, audio)
    for rule, round_to in RULES.items():
        fusion = fuse(transformer, adapters, allow_unmatched=True, round_to=round_to)
        out[f"out.{rule}.video"], out[f"out.{rule}.audio"] = transformer(video, audio)
        prefix = f"out.{rule}.weight."
        for key in case.tensors:
            if key.startswith(prefix):
                layer = key.removeprefix(prefix)
                out[key] = transformer.get_parameter(f"{layer}.weight").clone()
        fusion.unfuse()
    return {key: value for key, value in out.items() if value is not None}


def reference_factors(case: Case, name: str) -> dict[str, int]:
    lora = open_lora(find_checkpoint(case, name))
    return {
        "reference_downscale_factor": lora.reference_downscale_factor,
        "reference_temporal_scale_factor": lora.reference_temporal_scale_factor,
    }


def find_checkpoint(case: Case, name: str) -> Path:
    """The set's checkpoints/NAME, for cases that give a name without a path."""
    for folder in case.folder.resolve().parents:
        if (path := folder / "checkpoints" / name).is_file():
            return path
    raise InputError(f"{case.folder}: no checkpoints/{name} in a folder above")
