"""One golden case on disk: a `case.json` that describes it, an `io.safetensors` of tensors."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Case:
    """What a component's `run(case)` is given.

    `run` returns a dict: "out.NAME" (and, where cheap, "mid.NAME") tensors, and for tables of the
    case's `params` the recomputed table under "params.KEY".
    """

    folder: Path
    description: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Case":
        return cls(folder, json.loads((folder / "case.json").read_text()))

    @property
    def component(self) -> str:
        return self.description["component"]

    @property
    def name(self) -> str:
        return self.description["case"]

    @property
    def params(self) -> dict[str, Any]:
        return self.description.get("params") or {}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    def input(self, name: str) -> Tensor:
        """The tensor "in.NAME"."""
        return self.tensors[f"in.{name}"]

    def optional_input(self, name: str) -> Tensor | None:
        return self.tensors.get(f"in.{name}")

    def path(self, relative: str) -> Path:
        """A path that the case names, relative to its folder."""
        return self.folder / relative

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The case's checkpoint. Raises InputError when the case names none."""
        relative = self.description.get("checkpoint")
        if not relative:
            raise InputError(f"{self.folder}: the case names no checkpoint")
        return open_checkpoint(self.path(relative))

    def tolerance(self, key: str) -> tuple[float, float]:
        """(absolute, relative) tolerance of one tensor: its own, or the case's."""
        own = self.description["tensors"].get(key, {}).get("tolerance")
        chosen = own or self.description["tolerance"]
        return chosen["atol"], chosen["rtol"]
