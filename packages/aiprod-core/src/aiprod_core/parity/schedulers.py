"""Golden sigma tables. An output's name says which schedule it is; its meaning, the settings."""

import re
from math import prod

from torch import Tensor

from aiprod_core.components import schedulers
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Tensor]:
    steps = case.params.get("steps", 12)

    def setting(key: str, pattern: str, default: float) -> float:
        """A number spelled out in the output's meaning, such as "threshold 0.05"."""
        meaning = case.description["tensors"].get(f"out.{key}", {}).get("meaning", "")
        match = re.search(pattern, meaning)
        return float(match[1]) if match else default

    named = {
        "distilled": lambda: schedulers.table(schedulers.DISTILLED),
        "stage2_distilled": lambda: schedulers.table(schedulers.STAGE_2),
        "ltx2.nostretch": lambda: schedulers.shifted(steps, terminal=None),
        "ltx2.custom": lambda: schedulers.shifted(
            steps,
            max_shift=setting("ltx2.custom", r"max_shift ([\d.]+)", 1.5),
            min_shift=setting("ltx2.custom", r"base_shift ([\d.]+)", 0.5),
            terminal=setting("ltx2.custom", r"terminal ([\d.]+)", 0.05),
        ),
        "linear_quadratic.default": lambda: schedulers.linear_quadratic(steps),
        "linear_quadratic.custom": lambda: schedulers.linear_quadratic(
            steps,
            threshold=setting("linear_quadratic.custom", r"threshold ([\d.]+)", 0.05),
            linear_steps=int(setting("linear_quadratic.custom", r"(\d+) linear", 3)),
        ),
        "linear_quadratic.one": lambda: schedulers.linear_quadratic(1),
        "beta.default": lambda: schedulers.beta(steps),
        "beta.custom": lambda: schedulers.beta(
            steps,
            alpha=setting("beta.custom", r"alpha ([\d.]+)", 0.8),
            beta=setting("beta.custom", r"beta ([\d.]+)", 0.5),
        ),
    }
    got: dict[str, Tensor] = {}
    for key in case.tensors:
        name = key.removeprefix("out.")
        if name in named:
            got[key] = named[name]()
        elif match := re.fullmatch(r"ltx2\.default\.steps(\d+)", name):
            got[key] = schedulers.shifted(int(match[1]))
        elif match := re.fullmatch(r"ltx2\.latent_([\dx]+)\.steps(\d+)", name):
            num_tokens = prod(int(size) for size in match[1].split("x")[2:])
            got[key] = schedulers.shifted(int(match[2]), num_tokens=num_tokens)
    return got
