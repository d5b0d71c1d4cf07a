"""What a training run tells: a progress bar, `log.jsonl`, and trackers (TensorBoard and others).

Losses are means over all samples since the last line. They depend on the noise level more than on
the training, so each stream's is also told apart by level.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer

from aiprod_core.errors import InputError
from aiprod_trainer.objective import Noised
from aiprod_trainer.training_config import TrainingConfig

LEVELS = 4  # intervals of sigma


class Report:
    """Used as a context, by every process; only the first one writes."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, step: int):
        self.accelerator, self.config = accelerator, config
        self._pending: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._since, self._since_step = time.monotonic(), step
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(config.output_dir.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not accelerator.is_main_process or not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=config.optimization.steps, completed=step, note=""
        )
        if accelerator.log_with:
            options = {"wandb": {"entity": config.wandb.entity, "tags": list(config.wandb.tags)}}
            is_wandb = config.wandb.enabled
            project = config.wandb.project if is_wandb else config.trackio.project
            accelerator.init_trackers(project, init_kwargs=options if is_wandb else {})

    def __enter__(self) -> "Report":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def losses(self, examples: dict[str, Noised], losses: dict[str, Tensor]) -> None:
        """Keeps one batch's losses (B,), without waiting for the device."""
        for name, values in losses.items():
            self._pending[name].append((examples[name].modality.sigma, values.detach()))

    def check_finite(self, step: int, norm: float, last: Path | None, *, has_scaler: bool) -> None:
        """Raises InputError when this step must not be taken.

        A loss scaler overflows now and then and skips such a step itself; the loss must be finite.
        """
        loss = sum(
            float(values.sum()) for batch in self._pending.values() for _, values in batch[-1:]
        )
        if math.isfinite(loss) and (math.isfinite(norm) or has_scaler):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {norm}"
        kept = f"The last good checkpoint is {last}" if last else "No checkpoint was written yet"
        raise InputError(
            f"{self.config.output_dir}: {what} at step {step}. {kept}; go on with a lower "
            "optimization.learning_rate or max_grad_norm, and check the data."
        )

    def step(self, step: int, norm: float, optimizers: Sequence[Optimizer]) -> None:
        """A step is done; every `log_interval` steps its figures are written."""
        self._progress.update(self._task, completed=step)
        if step % self.config.log_interval and step != self.config.optimization.steps:
            return
        values = self._mean_losses()
        settings = self.config.optimization
        samples = settings.batch_size * settings.gradient_accumulation_steps
        samples *= self.accelerator.num_processes * (step - self._since_step)
        values |= {
            "learning_rate": optimizers[0].param_groups[0]["lr"],
            "gradient_norm": norm,
            "samples_per_s": samples / max(1e-9, time.monotonic() - self._since),
        }
        self._since, self._since_step = time.monotonic(), step
        self._write(step, values)

    def clips(self, step: int, files: Sequence[tuple[Path, np.ndarray]]) -> None:
        """Validation's files: each clip's path and its contact sheet."""
        if not self.accelerator.is_main_process:
            return
        for tracker in self.accelerator.trackers:
            for path, sheet in files:
                if tracker.name == "tensorboard":
                    tracker.writer.add_image(path.stem, sheet, step, dataformats="HWC")
                elif tracker.name == "wandb" and self.config.wandb.log_validation_videos:
                    import wandb  # pyright: ignore[reportMissingImports]

                    video = {f"validation/{path.stem}": wandb.Video(str(path))}
                    tracker.run.log(video, step=step)
        self._since = time.monotonic()  # the time of validation is not the training's

    def done(self, step: int, last: Path, *, is_stopped: bool) -> None:
        if self.accelerator.is_main_process:
            state = "stopped; run it again to go on" if is_stopped else "done"
            self._console.print(f"step {step}: {state}. Saved {last}", markup=False, soft_wrap=True)

    def _mean_losses(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, batches in self._pending.items():
            sigma = self._gathered([sigma for sigma, _ in batches])
            loss = self._gathered([losses for _, losses in batches])
            is_noised = sigma > 0
            values[f"{name}_loss"] = float(loss[is_noised].mean()) if is_noised.any() else 0.0
            level = (sigma * LEVELS).long().clamp(max=LEVELS - 1)
            for index in range(LEVELS):
                chosen = is_noised & (level == index)
                if chosen.any():
                    low, high = index / LEVELS, (index + 1) / LEVELS
                    values[f"{name}_loss/sigma {low:.2f}-{high:.2f}"] = float(loss[chosen].mean())
        self._pending.clear()
        return {"loss": sum(v for k, v in values.items() if "/" not in k)} | values

    def _gathered(self, batches: list[Tensor]) -> Tensor:
        """Of all processes, on the CPU."""
        gathered = self.accelerator.gather(torch.cat(batches))
        assert isinstance(gathered, Tensor)
        return gathered.cpu()

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if not self.accelerator.is_main_process:
            return
        line = {"step": step, "time": round(time.time(), 1)} | values
        with (self.config.output_dir / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = ("loss", "gradient_norm", "samples_per_s")
        note = "  ".join(f"{key} {values[key]:.4g}" for key in shown)
        self._progress.update(self._task, note=note)
        if self._progress.disable:
            self._console.print(f"step {step}  {note}", markup=False, soft_wrap=True)
