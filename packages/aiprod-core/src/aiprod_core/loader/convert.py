"""Writing a model in another form: other precision, adapters added, distilled; tensor by tensor.

The file is written as it is read, one tensor at a time, so a model of any size is converted in
little memory. All that is not the transformer is copied as it is.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import DTYPES, FP8, Checkpoint
from aiprod_core.loader.lora import Lora, changes_of, check_shapes
from aiprod_core.loader.lora_formats import Change
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.quantization.fp8 import is_cast_target, to_fp8


class Entry(NamedTuple):
    """A tensor that is to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def convert(
    checkpoint: Checkpoint,
    path: Path,
    *,
    to_fp8_weights: bool = False,
    dtype: torch.dtype | None = None,
    adapters: Sequence[tuple[Lora, float]] = (),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes `path`: the model with adapters added to its weights, in `dtype`, or with the blocks'
    large linears in fp8 as published (`-fp8` files, cast).

    `dtype` None keeps the file's own. `metadata` replaces entries of the header's. Sums are made in
    float32 and rounded to the weight's type before they are cast, as fusing at load time does.
    Raises InputError for a file that is in fp8 already, and for adapters of another model.
    """
    if checkpoint.is_fp8:
        raise InputError(f"{checkpoint.name} is in fp8 already; convert the bf16 file.")
    changes = _changes(checkpoint, adapters)
    entries = [
        Entry(key, info.shape, _target(key, info.dtype, dtype, to_fp8_weights))
        for key, info in checkpoint.tensors.items()
    ]

    def tensors(entries: Iterable[Entry]) -> Iterator[Tensor]:
        for key, _, target in entries:
            tensor = checkpoint.fetch(key)
            if key in changes:
                total = tensor.float()
                for lora, change, strength in changes[key]:
                    matrices = {k: lora.checkpoint.fetch(k).float() for k in change.keys}
                    total = total + strength * change.delta(matrices)
                tensor = total.to(tensor.dtype)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            yield to_fp8(tensor) if target == FP8 else tensor

    write_safetensors(path, entries, tensors, {**checkpoint.metadata, **(metadata or {})})


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    tensors: Any,  # (entries in the file's order) -> their tensors, one after the other
    metadata: Mapping[str, Any],
) -> None:
    """Writes a safetensors file without ever holding it; it appears when it is whole.

    Wider types come first, so that every tensor is aligned. Metadata values become JSON text.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {
        "__metadata__": {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    }
    at = 0
    for entry in ordered:
        end = at + entry.num_bytes
        header[entry.key] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry, tensor in zip(ordered, tensors(ordered), strict=True):
                assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _target(
    key: str, stored: torch.dtype, dtype: torch.dtype | None, to_fp8_weights: bool
) -> torch.dtype:
    """The type in which a tensor is written."""
    name = key_maps.TRANSFORMER.rename(key)
    layer, _, leaf = (name or "").rpartition(".")
    if to_fp8_weights and leaf in ("weight", "bias") and is_cast_target(layer):
        return FP8
    return dtype if dtype is not None and stored.is_floating_point else stored


def _changes(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Lora, float]]
) -> dict[str, list[tuple[Lora, Change, float]]]:
    """What is added to which key of the file."""
    if not adapters:
        return {}
    with torch.device("meta"):
        transformer = Transformer(
            TransformerConfig.from_metadata(checkpoint.section("transformer"))
        )
    found: dict[str, list[tuple[Lora, Change, float]]] = {}
    for lora, strength in adapters:
        changes, unmatched = changes_of(transformer, lora)
        if unmatched:
            raise InputError(
                f"{lora.checkpoint.paths[0]}: {len(unmatched)} of its layers are not in "
                f"{checkpoint.name}, such as {unmatched[0]}; it is for another model."
            )
        check_shapes(transformer, lora)
        for name, change in changes.items():
            key = key_maps.TRANSFORMER.publish(f"{name}.weight")
            found.setdefault(key, []).append((lora, change, strength))
    return found
