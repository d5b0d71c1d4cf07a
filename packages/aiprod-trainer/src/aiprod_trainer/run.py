"""A training run on disk: steps, checkpoints, exact resume, log, progress bar, graceful stop.

A script writes `for step in run.steps(): ...` and draws all its random numbers from
`run.generator(step)`, a function of (seed, step, rank). Nothing random survives a step, so a run
that was killed and resumed goes on exactly as if it had not been.
"""

import copy
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from aiprod_core.errors import InputError

State = Mapping[str, nn.Module | Optimizer]


class Run:
    """One run's folder and its state (named modules and optimisers).

    `folder/state.safetensors` holds everything that a resume needs and is replaced atomically
    every `save_every_s` seconds; `folder/log.jsonl` has a line for every logged step, and
    `folder/config.json` the configuration.
    """

    def __init__(
        self,
        folder: Path,
        state: State,
        config: BaseModel,
        *,
        total_steps: int,
        seed: int,
        save_every_s: float = 180.0,
        rank: int = 0,
    ):
        self.folder, self.state, self.total_steps = folder, state, total_steps
        self.seed, self.save_every_s, self.rank = seed, save_every_s, rank
        self.step = 0
        self._should_stop = False
        self._progress: Progress | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (folder / "config.json").write_text(config.model_dump_json(indent=1))
        if self.state_file.exists():
            self.step = load_state(self.state_file, state)

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    def steps(self) -> Iterator[int]:
        """Step numbers still to do. Saves as it goes, at the end, and on SIGTERM or Ctrl-C."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        saved_at = time.monotonic()
        with Progress(
            TextColumn(self.folder.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            disable=self.rank != 0,
        ) as self._progress:
            self._progress.add_task("", total=self.total_steps, completed=self.step, note="")
            while self.step < self.total_steps and not self._should_stop:
                yield self.step
                self.step += 1
                self._progress.update(self._progress.task_ids[0], completed=self.step)
                if self.rank == 0 and time.monotonic() - saved_at > self.save_every_s:
                    self.save()
                    saved_at = time.monotonic()
        if self.rank == 0:
            self.save()

    def save(self) -> None:
        save_state(self.state_file, self.state, self.step)

    def generator(self, step: int) -> torch.Generator:
        """All of one step's torch randomness: a function of (seed, step, rank)."""
        seed = np.random.SeedSequence([self.seed, step, self.rank]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed[0]) >> 1)

    def numpy_generator(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, self.rank])

    def log(self, **values: float) -> None:
        """Appends one line to the log and shows it beside the progress bar. NaN stops the run.

        Raises InputError when the loss is not finite; the last good checkpoint stays.
        """
        if self.rank != 0:
            return
        line = {"step": self.step, "time": round(time.time(), 1)} | values
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not np.isfinite(values.get("loss", 0.0)):
            raise InputError(
                f"{self.folder}: the loss is {values['loss']} at step {self.step}. The last good "
                f"checkpoint is {self.state_file}; resume it with a lower learning rate."
            )
        note = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], note=note)

    def _stop(self, *_: Any) -> None:
        self._should_stop = True


def save_state(path: Path, state: State, step: int) -> None:
    """Writes modules and optimisers as one safetensors file, under a temporary name first."""
    tensors: dict[str, Tensor] = {}
    for name, item in state.items():
        if isinstance(item, nn.Module):
            entries = item.state_dict()
        else:
            entries = {
                f"{index}.{slot}": torch.as_tensor(value)
                for index, slots in item.state_dict()["state"].items()
                for slot, value in slots.items()
            }
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in entries.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_state(path: Path, name: str) -> dict[str, Tensor]:
    """One item's tensors from `save_state`'s file. Raises InputError when there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give the folder of a training run.")
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
        return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}


def load_state(path: Path, state: State) -> int:
    """Fills modules and optimisers from `save_state`'s file and returns its step.

    Raises InputError when the file was written by another configuration.
    """
    for name, item in state.items():
        own = read_state(path, name)
        if isinstance(item, nn.Module):
            try:
                item.load_state_dict(own)
            except RuntimeError as error:
                raise InputError(
                    f"{path}: the checkpoint does not fit the configuration ({error}). "
                    "Give another output folder, or the configuration it was made with."
                ) from error
        else:
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in own.items():
                index, _, slot = key.partition(".")
                slots.setdefault(int(index), {})[slot] = value
            item.load_state_dict(item.state_dict() | {"state": slots})
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def averaged_copy(model: nn.Module) -> nn.Module:
    """A frozen copy that `update_average` moves towards the model (exponential moving average)."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float = 0.999) -> None:
    """EMA whose window grows with the run: the decay is at most (1 + step) / (10 + step)."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    ours = [p for p in average.state_dict().values() if p.is_floating_point()]
    theirs = [p for p in model.state_dict().values() if p.is_floating_point()]
    torch._foreach_lerp_(ours, theirs, weight)
