"""Transformers in GGUF files, as quantised by the llama.cpp family's tools.

The `gguf` package reads the format and widens its block types. A tensor is widened when it is
fetched, to bfloat16, and can be quantised again by `--quantization`. Such files hold a transformer
alone, mostly without the published prefix and without the config, which then comes from the other
files of the model.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.errors import CheckpointError, InputError

PREFIX = "model.diffusion_model."
SHAPE = "comfy.gguf.orig_shape."  # where a tool has flattened a tensor to fit its blocks


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Text metadata, and the shapes by published key. Raises CheckpointError for a damaged file."""
    reader, tensors = _read(path)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith((SHAPE, "GGUF.")) and isinstance(field.contents(), str)
    }
    return metadata, {key: _shape(reader, tensor) for key, tensor in tensors.items()}


def fetch_gguf(path: Path, key: str) -> Tensor:
    """One tensor, widened to bfloat16."""
    from gguf.quants import dequantize

    reader, tensors = _read(path)
    tensor = tensors[key]
    wide = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    return wide.to(torch.bfloat16).reshape(_shape(reader, tensor))


@lru_cache(maxsize=4)
def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The file's reader, and its tensors by published key."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise InputError(
            f'{path}: needs the gguf package: pip install "aiprod-core[gguf]"'
        ) from None
    try:
        reader = GGUFReader(path)
        return reader, {_key(tensor.name): tensor for tensor in reader.tensors}
    except Exception as error:  # the package raises whatever it stumbles over
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error}).") from error


def _key(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    field = reader.get_field(SHAPE + tensor.name)
    if field is not None:
        return tuple(int(size) for size in field.contents())
    return tuple(int(size) for size in reversed(tensor.shape))  # ggml counts from the last axis
