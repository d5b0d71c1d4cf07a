"""Golden guidance formulas. An output's name or meaning spells its settings out."""

import json
import re
from typing import Any

from torch import Tensor

from aiprod_core.components import guiders
from aiprod_core.components.guiders import Guidance
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Any]:
    cond, uncond = case.input("cond"), case.input("uncond")
    perturbed, isolated = case.input("perturbed"), case.input("isolated")
    # Legacy settings: "scale 2 eta .5 thr 5 momentum .4".
    legacy = _settings(case, "out.apg_legacy.step0")
    stateful = guiders.MomentumAPG(
        eta=legacy.get("eta", 0.5),
        norm_threshold=legacy.get("thr", 5.0),
        momentum=legacy.get("momentum", 0.4),
    )
    got: dict[str, Any] = {}
    for key in sorted(case.tensors):
        kind, _, variant = key.removeprefix("out.").partition(".")
        settings = _settings(case, key)
        scale = _scale(variant) or settings.get("scale", 5.0)
        first = cond[:1], uncond[:1]
        if not key.startswith("out."):
            continue
        if kind == "cfg":
            got[key] = guiders.cfg_delta(cond, uncond, scale)
        elif kind == "cfg_star":
            got[key] = guiders.cfg_star_delta(*first, scale)
        elif kind == "stg":
            got[key] = guiders.stg_delta(cond, perturbed, scale)
        elif kind == "apg":
            got[key] = guiders.apg_delta(
                *first,
                scale,
                eta=settings.get("eta", 1.0),
                norm_threshold=settings.get("norm_threshold", 0.0),
            )
        elif kind == "apg_legacy":
            pair = first if variant == "step0" else (perturbed[:1], isolated[:1])
            got[key] = stateful(*pair, legacy.get("scale", 2.0))
        elif kind == "multimodal":
            got[key] = _multimodal(case, key, (cond, uncond, perturbed, isolated))
    return got | _tables(case)


def _multimodal(case: Case, key: str, estimates: tuple[Tensor, ...]) -> Tensor:
    scales = json.loads(case.description["tensors"][key]["meaning"])
    guidance = Guidance(
        cfg_scale=scales["cfg"],
        stg_scale=scales["stg"],
        rescale=scales["rescale"],
        modality_scale=scales["modality"],
    )
    return guiders.guide(guidance, *estimates)


def _tables(case: Case) -> dict[str, Any]:
    got: dict[str, Any] = {}
    if table := case.params.get("skip_step"):
        got["params.skip_step"] = {
            k: [Guidance(skip_step=int(k)).skips(step) for step in range(len(flags))]
            for k, flags in table.items()
        }
    if sigma_binned := case.params.get("sigma_binned"):
        table = {float(key): value for key, value in sigma_binned["table"].items()}
        got["params.sigma_binned"] = {
            "table": sigma_binned["table"],
            "lookup": {k: guiders.binned(table, float(k)) for k in sigma_binned["lookup"]},
        }
    return got


def _settings(case: Case, key: str) -> dict[str, float]:
    """The "name number" pairs of an output's meaning."""
    meaning = case.description["tensors"].get(key, {}).get("meaning", "")
    pairs = re.findall(r"([a-z_]+) (\d*\.?\d+)", meaning)
    return {name: float(value) for name, value in pairs}


def _scale(variant: str) -> float | None:
    match = re.search(r"scale(\d+(?:\.\d+)?)", variant)
    return float(match[1]) if match else None
