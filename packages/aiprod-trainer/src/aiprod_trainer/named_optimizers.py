"""Optimisers and learning-rate schedules by the names that configurations use.

A schedule is a function of the step, so a resumed run needs no state of it.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from aiprod_core.errors import InputError
from aiprod_trainer.optimizers import muon_and_adamw


def check_names(optimizer_type: str, scheduler_type: str) -> None:
    """Raises InputError for a name that is none, with the nearest one."""
    _chosen("optimizer_type", optimizer_type, OPTIMIZERS)
    _chosen("scheduler_type", scheduler_type, SCHEDULES)


def build_optimizers(
    name: str, model: nn.Module, learning_rate: float, params: Mapping[str, Any]
) -> list[Optimizer]:
    """The optimiser of everything in `model` that is trained; Muon brings an AdamW with it.

    Raises InputError for an unknown name or setting, or a package that is not installed.
    """
    build = _chosen("optimizer_type", name, OPTIMIZERS)
    try:
        return build(model, learning_rate, **params)
    except TypeError as error:
        raise InputError(
            f"optimization.optimizer_params: {name} does not take it: {error}"
        ) from None
    except ModuleNotFoundError as error:
        raise InputError(
            f"optimization.optimizer_type {name} needs a package: pip install {error.name}"
        ) from None


def adamw(model: nn.Module, lr: float, **params: Any) -> list[Optimizer]:
    parameters = _trained(model)
    # One kernel for all parameters, where there is one; spread ones (DTensor) have none.
    is_whole = not hasattr(parameters[0], "full_tensor")
    fused = is_whole and parameters[0].device.type in ("cpu", "cuda")
    settings: dict[str, Any] = {"fused": fused} | params
    return [AdamW(parameters, lr=lr, **settings)]


def adamw8bit(model: nn.Module, lr: float, **params: Any) -> list[Optimizer]:
    """Moments in 8 bits (arXiv:2110.02861), from bitsandbytes."""
    from bitsandbytes.optim.adamw import AdamW8bit

    return [AdamW8bit(_trained(model), lr=lr, **params)]


def muon(
    model: nn.Module, lr: float, adamw_lr: float | None = None, **params: Any
) -> list[Optimizer]:
    """Ours, for the matrices; vectors, tables and the first and last layers take AdamW."""
    rates = {"muon_lr": lr, "adamw_lr": adamw_lr or lr}
    return list(muon_and_adamw(model, **rates, **params).values())


def schedule_free(model: nn.Module, lr: float, **params: Any) -> list[Optimizer]:
    """AdamW that needs no schedule (arXiv:2405.15682), from schedulefree."""
    from schedulefree import AdamWScheduleFree

    return [AdamWScheduleFree(_trained(model), lr=lr, **params)]


OPTIMIZERS: dict[str, Callable[..., list[Optimizer]]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "muon": muon,
    "schedule_free": schedule_free,
}


def _trained(model: nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# Learning rates: the fraction of the full rate at a step of a run. LTX-2's names and settings.


def learning_rate_factor(
    name: str, step: int, total_steps: int, warmup_steps: int, params: Mapping[str, Any]
) -> float:
    """Rises linearly over `warmup_steps`, then follows the schedule over the rest of the run."""
    schedule = _chosen("scheduler_type", name, SCHEDULES)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    try:
        return schedule(step - warmup_steps, max(1, total_steps - warmup_steps), **params)
    except TypeError as error:
        raise InputError(
            f"optimization.scheduler_params: {name} does not take it: {error}"
        ) from None


def constant(step: int, total: int) -> float:
    return 1.0


def linear(step: int, total: int, start_factor: float = 1.0, end_factor: float = 0.1) -> float:
    return start_factor + (end_factor - start_factor) * min(1.0, step / total)


def cosine(step: int, total: int, end_factor: float = 0.0) -> float:
    done = min(1.0, step / total)
    return end_factor + (1 - end_factor) * (1 + math.cos(math.pi * done)) / 2


def cosine_with_restarts(
    step: int, total: int, num_cycles: int = 1, end_factor: float = 0.0
) -> float:
    done = num_cycles * step / total % 1.0
    return end_factor + (1 - end_factor) * (1 + math.cos(math.pi * done)) / 2


def polynomial(step: int, total: int, power: float = 1.0, end_factor: float = 0.0) -> float:
    return end_factor + (1 - end_factor) * max(0.0, 1 - step / total) ** power


def step_decay(step: int, total: int, step_size: int = 500, gamma: float = 0.5) -> float:
    return gamma ** (step // step_size)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "step": step_decay,
}


def _chosen(key: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name in choices:
        return choices[name]
    near = difflib.get_close_matches(name, choices, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"optimization.{key} must be one of {', '.join(choices)}; got {name}{hint}")
