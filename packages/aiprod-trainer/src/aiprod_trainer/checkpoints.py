"""Checkpoints of `aiprod train`: folders that appear whole, the last N kept, the latest resumed.

    checkpoints/step-000250/
        lora.safetensors     published names (model.safetensors after full fine-tuning)
        state.safetensors    what a resume needs: weights, averages, optimiser, step
        config.yaml

A folder is written as `step-000250.tmp` and renamed when everything is in it and on disk, so a
process killed at any point leaves the checkpoint before. The state knows parameters by name and
holds whole tensors: it does not depend on how many processes wrote it or will read it.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from aiprod_core.errors import InputError

# Of an optimiser's group, what a step changes; the rest follows the configuration.
PROGRESS = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
NO_STATE = (
    "saved with checkpoints.save_training_state {kind}, which cannot be resumed; start anew from "
    "it with model.load_checkpoint and another output_dir."
)

Named = Mapping[str, Tensor]


def folder_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below a run's folder."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """In the order of their steps; none that is still being written."""
    found = (folder / "checkpoints").glob("step-*")
    complete = [path for path in found if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def published_file(path: Path) -> Path:
    """The weights of a file, a checkpoint's folder, or a run's folder (its latest)."""
    if path.is_file():
        return path
    folders = [path, latest(path), latest(path.parent)]
    for folder in folders:
        for name in ("lora.safetensors", "model.safetensors"):
            if folder is not None and (folder / name).is_file():
                return folder / name
    raise InputError(f"{path}: no checkpoint here; give a .safetensors file or a run's folder.")


def write_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], keep_last_n: int = -1
) -> Path:
    """Makes `checkpoints/step-N` by `write(folder)`, atomically, and drops the oldest."""
    path = folder_of(folder, step)
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for file in temporary.iterdir():
        _sync(file)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)
    _sync(path.parent)
    for old in complete_checkpoints(folder)[:-keep_last_n] if keep_last_n > 0 else []:
        shutil.rmtree(old)
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Training state.


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, told without importing what only parallel runs need."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A tensor on the CPU, gathered where it is spread over processes (a call of all of them)."""
    return (tensor.full_tensor() if is_spread(tensor) else tensor).detach().cpu()


def spread_like(value: Tensor, like: Any) -> Tensor:
    """The inverse of `whole`: on the device, and over the processes, of `like`."""
    if is_spread(like):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value.to(like.device)


def gather(tensors: Named, is_kept: bool) -> dict[str, Tensor]:
    """Whole tensors, one after another; all processes take part, those that keep them have them."""
    pairs = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: value for name, value in pairs if is_kept}


def gather_state(
    parameters: Mapping[str, nn.Parameter],
    average: Named | None,
    optimizers: Iterable[Optimizer],
    is_kept: bool = True,  # by this process
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that decides the next step, as whole tensors, and the optimisers' scalar settings."""
    tensors: dict[str, Tensor] = {f"model/{name}": p for name, p in parameters.items()}
    tensors |= {f"average/{name}": value for name, value in (average or {}).items()}
    names = {id(p): name for name, p in parameters.items()}
    groups = []
    for optimizer in optimizers:
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                value = value if isinstance(value, Tensor) else torch.tensor(value)
                tensors[f"optimizer/{names[id(parameter)]}/{slot}"] = value
        groups.append(
            [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        )
    return gather(tensors, is_kept), {"groups": groups}


def save_state(path: Path, tensors: Named, step: int, facts: Mapping[str, Any]) -> None:
    """`gather_state`'s tensors and facts in one file."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        # Optimisers share tables between parameters, which the format does not allow.
        apart[name] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    save_file(apart, path, metadata={"step": str(step), "facts": json.dumps(facts)})


@torch.no_grad()
def load_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor] | None,
    optimizers: Iterable[Optimizer],
) -> int:
    """Fills parameters, averages and optimisers from a checkpoint's state; returns its step.

    Raises InputError when the state is of another configuration, or holds no optimiser.
    """
    if not path.is_file():
        raise InputError(f"{path.parent}: {NO_STATE.format(kind='off')}")
    with safe_open(path, framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        facts = json.loads(metadata["facts"])
        _check_fit(path, keys, parameters, average, lambda key: file.get_slice(key).get_shape())
        for name, parameter in parameters.items():
            parameter.copy_(spread_like(file.get_tensor(f"model/{name}"), parameter))
        for name, value in (average or {}).items():
            value.copy_(spread_like(file.get_tensor(f"average/{name}"), value))
        names = {id(p): name for name, p in parameters.items()}
        for optimizer, groups in zip(optimizers, facts["groups"], strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: values[key] for key in PROGRESS if key in values})
                for parameter in group["params"]:
                    prefix = f"optimizer/{names[id(parameter)]}/"
                    own = [key for key in keys if key.startswith(prefix)]
                    slots = {k.removeprefix(prefix): file.get_tensor(k) for k in own}
                    if slots:
                        optimizer.state[parameter] = {
                            slot: _slot(value, parameter, is_fused=bool(group.get("fused")))
                            for slot, value in slots.items()
                        }
        return int(metadata["step"])


def _slot(value: Tensor, parameter: Tensor, *, is_fused: bool) -> Any:
    if value.ndim == 0 and not value.is_floating_point():
        return value.item()  # a counter
    if value.shape == parameter.shape:
        return spread_like(value, parameter)
    # AdamW keeps its step counts on the CPU unless it is fused; tables go where they are used.
    return value if value.ndim == 0 and not is_fused else value.to(parameter.device)


def _check_fit(
    path: Path,
    keys: set[str],
    parameters: Mapping[str, nn.Parameter],
    average: Named | None,
    shape_of: Callable[[str], list[int]],
) -> None:
    wanted = {f"model/{name}": p for name, p in parameters.items()}
    wanted |= {f"average/{name}": p for name, p in (average or {}).items()}
    saved = {key for key in keys if not key.startswith("optimizer/")}
    wrong = [key for key in wanted if key in saved and list(wanted[key].shape) != shape_of(key)]
    different = wrong or sorted(wanted.keys() ^ saved)
    if different:
        raise InputError(
            f"{path}: the checkpoint does not fit the configuration ({different[0]} differs). "
            "Give another output_dir, or the configuration it was made with."
        )
    if not any(key.startswith("optimizer/") for key in keys):
        raise InputError(f"{path}: {NO_STATE.format(kind='minimal')}")
