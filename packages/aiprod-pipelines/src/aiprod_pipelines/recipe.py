"""The recipe that every clip carries: all that is needed to make it again.

A JSON object in the MP4's comment tag: the resolved request, the model and its hash, the versions
of what computed it, and a hash of the final latents by which a second run can be compared.
"""

import functools
import hashlib
import json
import platform
import struct
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import Checkpoint
from aiprod_pipelines import media
from aiprod_pipelines.request import GenerationRequest

FORMAT = 1
TAG = "comment"  # shown by players and kept by most tools that copy MP4 files
# A stream begins before its latents are known, so their hash comes at its end: in a box of a kind
# that players skip.
TRAILER = struct.Struct(">I4s16s64s")
TRAILER_NAME = b"latents_sha256"

# Larger files are known by samples of their bytes, in milliseconds instead of minutes.
WHOLE_FILE_LIMIT = 2**30
NUM_SAMPLES, SAMPLE_BYTES = 256, 2**16


def make_recipe(
    pipeline: str,
    model: str,
    checkpoint: Checkpoint,
    request: GenerationRequest,
    latents: dict[str, Tensor] | None,
    computed_on: dict[str, str],
    text_encoder: Path | str | None = None,
    other_parts: Sequence[Path] = (),
) -> dict[str, Any]:
    """`latents` are the final ones by modality; `computed_on` is what `circumstances` gives.

    None stands for latents that are not made yet: their hash follows in a `trailer`. `other_parts`
    are files of a split model that were given besides `model`.
    """
    return {
        "aiprod": FORMAT,
        "pipeline": pipeline,
        "model": {
            "name": model,
            "other_parts": [str(path) for path in other_parts],
            "files": [file_identity(path) for path in checkpoint.paths],
        },
        "text_encoder": text_encoder_identity(text_encoder),
        "request": request.to_dict(),
        "inputs": {str(path): input_sha256(path) for path in request.input_files},
        "computed_on": computed_on,
        "versions": versions(),
        "latents_sha256": None if latents is None else latents_sha256(latents),
    }


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What else decides the last bits of a result: the hardware, the precision, the threads."""
    is_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
    }


def versions() -> dict[str, str]:
    names = ("aiprod-core", "aiprod-pipelines", "torch", "transformers", "av")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def embed(recipe: dict[str, Any]) -> dict[str, str]:
    """Container metadata that carries the recipe."""
    return {TAG: json.dumps(recipe, ensure_ascii=False), "title": recipe["request"]["prompt"][:200]}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe of a clip. Raises InputError when the file carries none."""
    try:
        recipe = json.loads(media.probe(path).metadata.get(TAG, ""))
        if isinstance(recipe, dict) and "aiprod" in recipe:
            recipe["latents_sha256"] = recipe["latents_sha256"] or _read_trailer(Path(path))
            return recipe
    except ValueError:
        pass
    raise InputError(
        f"{path}: carries no AIPROD recipe; it was made by another program, or a tool that copied "
        "it dropped the metadata."
    )


def trailer(digest: str) -> bytes:
    """What ends a stream whose recipe was written before the hash of its latents was known."""
    return TRAILER.pack(TRAILER.size, b"free", TRAILER_NAME, digest.encode())


def _read_trailer(path: Path) -> str | None:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TRAILER.size))
        end = file.read()
    if len(end) != TRAILER.size:
        return None
    size, kind, name, digest = TRAILER.unpack(end)
    is_ours = (size, kind, name.rstrip(b"\0")) == (TRAILER.size, b"free", TRAILER_NAME)
    return digest.decode() if is_ours else None


def latents_sha256(latents: dict[str, Tensor]) -> str:
    """A hash of names, shapes and float32 values: equal hashes mean equal latents, bit for bit."""
    digest = hashlib.sha256()
    for name, latent in sorted(latents.items()):
        digest.update(f"{name}{tuple(latent.shape)}".encode())
        digest.update(latent.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_identity(path: Path) -> dict[str, Any]:
    """Name, size and hash of a file: of all its bytes, or of samples of them above 1 GiB.

    The samples are the start, where a weight file's header is, and stretches at even distances:
    training or conversion changes every tensor, and so every sample. A file is hashed once while
    its size and time of change stay the same.
    """
    found = path.stat()
    return dict(_identity(path, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _identity(path: Path, size: int, modified_ns: int) -> dict[str, Any]:
    if size <= WHOLE_FILE_LIMIT:
        return {"file": path.name, "bytes": size, "sha256": file_sha256(path)}
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(NUM_SAMPLES):
            file.seek(index * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"file": path.name, "bytes": size, "sampled_sha256": digest.hexdigest()}


def contents_of(identity: dict[str, Any]) -> str:
    """The hash in a `file_identity`."""
    return identity.get("sha256") or identity["sampled_sha256"]


def input_sha256(path: Path) -> str:
    return contents_of(file_identity(path))


def text_encoder_identity(source: Path | str | None) -> dict[str, Any]:
    """Where a text encoder is from, and its files if that is a folder."""
    folder = Path(source) if source is not None else None
    if folder is None or not folder.is_dir():
        return {"source": None if source is None else str(source), "files": []}
    names = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("tokenizer.*"))]
    return {"source": str(folder), "files": [file_identity(path) for path in names]}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
