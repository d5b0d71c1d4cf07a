"""Weights from safetensors files, in five visible steps.

Read the header, build the module on the meta device, map published names to ours, check every
parameter against the header, assign memory-mapped tensors. A checkpoint is a list of files (one
monolith, shards, or the split layout); the configuration is in the first header that carries one.
Nothing is read but the header until a module asks for its tensors.
"""

import json
import logging
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError
from aiprod_core.loader.gguf_files import fetch_gguf, open_gguf

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FP8 = torch.float8_e4m3fn  # weights that stay as they are whatever precision is asked for

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class KeyMap:
    """From names in the file to names in the module, per component.

    `prefixes` are tried in order; the first that a key starts with is replaced by its value.
    `ignored` are name parts that the specification says to skip (extra statistics of the VAE).
    """

    prefixes: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()

    def rename(self, key: str) -> str | None:
        """The module's name for a file's key, or None when the key belongs to someone else."""
        for old, new in self.prefixes:
            if key.startswith(old):
                if any(part in key for part in self.ignored):
                    return None
                return new + key[len(old) :]
        return None

    def publish(self, name: str) -> str:
        """The file's name for a module's: the inverse of `rename`, by the most specific prefix."""
        old, new = max(
            (entry for entry in self.prefixes if name.startswith(entry[1])),
            key=lambda entry: len(entry[1]),
        )
        return old + name[len(new) :]


@dataclass(frozen=True)
class Checkpoint:
    """The headers of one model's files. `tensors` maps every key to its description."""

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def name(self) -> str:
        return self.paths[0].name

    @property
    def config(self) -> dict[str, Any]:
        """The `config` metadata. Raises CheckpointError when the file has none."""
        config = self.metadata.get("config")
        if not isinstance(config, dict):
            kind = (
                "It holds LoRA matrices: give it with --lora and the base model with --model."
                if self.is_lora
                else "Use the file as published: conversions often drop the header's metadata."
            )
            raise CheckpointError(f'{self.paths[0]}: no "config" in the header metadata. {kind}')
        return config

    def section(self, name: str) -> dict[str, Any]:
        """One component's part of the config. Raises CheckpointError when the file lacks it."""
        section = self.config.get(name)
        if not isinstance(section, dict):
            raise CheckpointError(
                f'{self.paths[0]}: the header config has no "{name}" section; it has '
                f"{', '.join(sorted(self.config)) or 'nothing'}. Give the file that holds it."
            )
        return section

    @property
    def version(self) -> tuple[int, ...]:
        """`model_version` as integers, stopping at the first tag; () when absent (2.0 files)."""
        numbers: list[int] = []
        for part in str(self.metadata.get("model_version", "")).replace("-", ".").split("."):
            if not part.isdigit():
                break
            numbers.append(int(part))
        return tuple(numbers)

    @property
    def is_lora(self) -> bool:
        marks = (".lora_", ".lora.", ".lokr_", ".hada_")
        return any(mark in key for key in self.tensors for mark in marks)

    @property
    def is_fp8(self) -> bool:
        return any(info.dtype == FP8 for info in self.tensors.values())

    def read(self, keys: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The named tensors, memory-mapped on the CPU. Raises CheckpointError on a damaged file."""
        by_path: dict[Path, list[str]] = {}
        for key in keys:
            by_path.setdefault(self.tensors[key].path, []).append(key)
        tensors: dict[str, Tensor] = {}
        for path, names in by_path.items():
            if path.suffix == ".gguf":
                tensors |= {name: self.fetch(name).to(device) for name in names}
                continue
            try:
                with safe_open(path, framework="pt", device=str(device)) as file:
                    tensors |= {name: file.get_tensor(name) for name in names}
            except Exception as error:  # safetensors raises its own type, unreadable by users
                raise CheckpointError(
                    f"{path}: cannot be read ({error}). Fetch it again."
                ) from error
        return tensors

    def fetch(self, key: str) -> Tensor:
        """One tensor in memory of its own: nothing of the file stays mapped when it is gone."""
        info = self.tensors[key]
        if info.path.suffix == ".gguf":
            return fetch_gguf(info.path, key)
        content = torch.empty(info.num_bytes, dtype=torch.uint8)
        with info.path.open("rb") as file:
            file.seek(info.offset)
            if file.readinto(content.numpy().data) != info.num_bytes:
                raise CheckpointError(f"{info.path}: cut short at {key}. Fetch it again.")
        return content.view(info.dtype).reshape(info.shape)


def open_checkpoint(*paths: str | Path) -> Checkpoint:
    """Reads the headers of one model's files and nothing else; the first that has a key, has it.

    Raises CheckpointError for a missing, truncated or foreign file.
    """
    metadata: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    resolved = tuple(Path(path) for path in paths)
    for path in resolved:
        if path.suffix == ".gguf" and path.is_file():
            found, shapes = open_gguf(path)
            for key, value in found.items():
                metadata.setdefault(key, _json_or_text(value))
            tensors |= {
                key: TensorInfo(path, shape, torch.bfloat16) for key, shape in shapes.items()
            }
            continue
        header, start = _read_header(path)
        for key, value in header.pop("__metadata__", {}).items():
            metadata.setdefault(key, _json_or_text(value))
        for key, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: {key} has type {entry['dtype']}, which is not supported; "
                    f"supported are {', '.join(DTYPES)}."
                )
            shape, offset = tuple(entry["shape"]), start + entry["data_offsets"][0]
            tensors.setdefault(key, TensorInfo(path, shape, DTYPES[entry["dtype"]], offset))
    return Checkpoint(resolved, metadata, tensors)


def load_module(
    checkpoint: Checkpoint,
    key_map: KeyMap,
    build: Callable[[], M],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep: Callable[[str], bool] | None = None,
    is_left: Callable[[str], bool] = lambda name: False,
    store: Callable[[nn.Module, str, Tensor], None] | None = None,
) -> M:
    """Builds a module on the meta device and fills every parameter and buffer from the checkpoint.

    `dtype` casts floating tensors (float8 weights stay as they are); None keeps the file's own.
    `keep` further restricts which module names are read (an audio-only model from an AV file). What
    `is_left` names stays on the meta device, for whoever reads it when it is needed. `store` puts
    a tensor into the module instead of `assign`. Tensors that are used as they lie in the file are
    memory-mapped; others are read one at a time, so that the file is never in memory beside them.
    Raises CheckpointError listing missing and misshapen names. Names under the component's prefix
    that the module does not have are reported in one log line.
    """
    with torch.device("meta"):
        module = build()
    wanted = {
        **dict(module.named_parameters()),
        **{name: b for name, b in module.named_buffers() if _is_persistent(module, name)},
    }
    source = {new: key for key in checkpoint.tensors if (new := key_map.rename(key)) is not None}
    if keep is not None:
        source = {new: key for new, key in source.items() if keep(new)}
    _check_names(checkpoint, wanted, source)
    infos = {name: checkpoint.tensors[source[name]] for name in wanted}
    types = {
        name: dtype
        if dtype is not None and info.dtype.is_floating_point and info.dtype != FP8
        else info.dtype
        for name, info in infos.items()
    }
    as_they_lie = {
        source[name]
        for name, info in infos.items()
        if store is None and not is_left(name) and types[name] == info.dtype
    }
    loaded = checkpoint.read(as_they_lie, device)
    for name, info in infos.items():
        key = source[name]
        if is_left(name):
            tensor = torch.empty(info.shape, dtype=types[name], device="meta")
        elif key in as_they_lie:
            tensor = loaded.pop(key)
        else:
            tensor = checkpoint.fetch(key).to(device, types[name])
        (store or assign)(module, name, tensor)
    return module.eval().requires_grad_(False)


def save_checkpoint(
    path: Path,
    modules: Iterable[tuple[KeyMap, nn.Module]],
    metadata: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes modules into one file under their published names; metadata values become JSON text.

    The file appears under its name only when it is whole. `dtype` casts floating tensors.
    """
    tensors: dict[str, Tensor] = {}
    for key_map, module in modules:
        for name, tensor in module.state_dict().items():
            cast = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            tensors[key_map.publish(name)] = cast.contiguous()
    temporary = path.with_name(path.name + ".tmp")
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file(tensors, temporary, metadata=text)
    temporary.replace(path)


def _check_names(
    checkpoint: Checkpoint, wanted: Mapping[str, Tensor], source: Mapping[str, str]
) -> None:
    missing = [name for name in wanted if name not in source]
    if missing:
        raise CheckpointError(
            f"{checkpoint.paths[0]}: {len(missing)} of {len(wanted)} tensors are missing: "
            f"{_some(missing)}. The file is another component or an incomplete conversion."
        )
    misshapen = [
        f"{source[name]} is {list(found)} in the file, {list(tensor.shape)} by its config"
        for name, tensor in wanted.items()
        if (found := checkpoint.tensors[source[name]].shape) != tuple(tensor.shape)
    ]
    if misshapen:
        raise CheckpointError(
            f"{checkpoint.paths[0]}: {len(misshapen)} tensors have another shape than the header's "
            f"config says: {_some(misshapen)}."
        )
    unread = [source[name] for name in source if name not in wanted]
    if unread:
        logger.warning(
            "%s: %d tensors are not used: %s", checkpoint.name, len(unread), _some(unread)
        )


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes a tensor the module's parameter or buffer of this name."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _is_persistent(module: nn.Module, name: str) -> bool:
    owner_name, _, leaf = name.rpartition(".")
    return leaf not in module.get_submodule(owner_name)._non_persistent_buffers_set


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where in the file the tensors begin."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] != b"{":  # what follows the length in every safetensors file
            is_pickle = start[:2] == b"PK" or start[:1] == b"\x80"
            raise CheckpointError(
                f"{path}: this is a pickle, which can run code when opened. Convert it to "
                "safetensors and give that file."
                if is_pickle
                else f"{path}: not a safetensors file, or cut short. Fetch it again."
            )
        (length,) = struct.unpack("<Q", start[:8])
        if length + 8 > size or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file, or cut short. Fetch it again.")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            if not all(isinstance(e["shape"], list) and e["dtype"] for e in entries.values()):
                raise ValueError("a tensor without shape or type")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{path}: the safetensors header is damaged ({error}). Fetch it again."
            ) from error
    if 8 + length + end > size:
        raise CheckpointError(
            f"{path}: cut short: the header promises {8 + length + end} bytes, "
            f"the file has {size}. Fetch it again."
        )
    return header, 8 + length


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _some(names: list[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
