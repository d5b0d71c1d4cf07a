"""The recipe that every clip carries: all that is needed to make it again.

A JSON object in the MP4's comment tag: the resolved request, the model and its hash, the versions
of what computed it, and a hash of the final latents by which a second run can be compared.
"""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import Checkpoint
from aiprod_pipelines import media
from aiprod_pipelines.request import GenerationRequest

FORMAT = 1
TAG = "comment"  # shown by players and kept by most tools that copy MP4 files
WHOLE_FILE_LIMIT = 2**30  # bytes; larger files are known by their header, in milliseconds


def make_recipe(
    pipeline: str,
    model: str,
    checkpoint: Checkpoint,
    request: GenerationRequest,
    latents: dict[str, Tensor],
    computed_on: dict[str, str],
) -> dict[str, Any]:
    """`latents` are the final ones by modality; `computed_on` names device and dtype."""
    return {
        "aiprod": FORMAT,
        "pipeline": pipeline,
        "model": {"name": model, "files": [file_identity(path) for path in checkpoint.paths]},
        "request": request.to_dict(),
        "inputs": {str(image.path): file_sha256(image.path) for image in request.images},
        "computed_on": computed_on,
        "versions": {
            "python": platform.python_version(),
            **{
                name: metadata.version(name)
                for name in ("aiprod-core", "aiprod-pipelines", "torch", "av")
            },
        },
        "latents_sha256": latents_sha256(latents),
    }


def embed(recipe: dict[str, Any]) -> dict[str, str]:
    """Container metadata that carries the recipe."""
    return {TAG: json.dumps(recipe, ensure_ascii=False), "title": recipe["request"]["prompt"][:200]}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe of a clip. Raises InputError when the file carries none."""
    try:
        recipe = json.loads(media.probe(path).metadata.get(TAG, ""))
        if isinstance(recipe, dict) and "aiprod" in recipe:
            return recipe
    except ValueError:
        pass
    raise InputError(
        f"{path}: carries no AIPROD recipe; it was made by another program, or a tool that copied "
        "it dropped the metadata."
    )


def latents_sha256(latents: dict[str, Tensor]) -> str:
    """A hash of names, shapes and float32 values: equal hashes mean equal latents, bit for bit."""
    digest = hashlib.sha256()
    for name, latent in sorted(latents.items()):
        digest.update(f"{name}{tuple(latent.shape)}".encode())
        digest.update(latent.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_identity(path: Path) -> dict[str, Any]:
    """Name, size and hash of a weight file: of all its bytes, or of its header above 1 GiB."""
    size = path.stat().st_size
    if size <= WHOLE_FILE_LIMIT:
        return {"file": path.name, "bytes": size, "sha256": file_sha256(path)}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = hashlib.sha256(file.read(length)).hexdigest()
    return {"file": path.name, "bytes": size, "header_sha256": header}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
