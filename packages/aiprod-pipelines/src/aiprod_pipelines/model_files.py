"""Finding a model's files by its name, and what their headers say.

A model is named by `nano`, by a path (one file, shards, or a folder of split files), or by a hub
repository (`org/name`, or `org/name/file.safetensors` where it holds several). No weight is read.
"""

import dataclasses
import importlib.resources
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader import networks
from aiprod_core.loader.checkpoint import DTYPES, Checkpoint, TensorInfo, open_checkpoint
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.text_connector import TextConfig
from aiprod_core.model.transformer import TransformerConfig
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_core.model.vocoder import VocoderConfig
from aiprod_pipelines.request import ModelProfile, PerModality

logger = logging.getLogger(__name__)

# Names of files in the package aiprod_nano. All but the first are made of it where they are wanted
# (`aiprod models convert`): together they would be three times what ships.
BUNDLED = {
    "nano": "nano-dev.safetensors",
    "nano-dev-fp8": "nano-dev-fp8.safetensors",
    "nano-distilled": "nano-distilled.safetensors",
    "nano-distilled-fp8": "nano-distilled-fp8.safetensors",
}

COMPONENT_PREFIXES = {
    "transformer": ("model.diffusion_model.",),
    "text connectors": (
        "model.diffusion_model.video_embeddings_connector.",
        "model.diffusion_model.audio_embeddings_connector.",
    ),
    "text projection": ("text_embedding_projection.",),
    "video encoder": ("vae.encoder.", "encoder."),
    "video decoder": ("vae.decoder.", "decoder."),
    "audio encoder": ("audio_vae.encoder.",),
    "audio decoder": ("audio_vae.decoder.",),
    "vocoder": ("vocoder.",),
}


# Finding a model.


def resolve_model(model: str, text_encoder: str | Path | None = None) -> list[Path]:
    """The files of a model by its name. Raises InputError saying what was looked for."""
    if model in BUNDLED:
        return [_bundled_path(model)]
    path = Path(model).expanduser()
    if path.is_dir():
        return _files_of_folder(path)
    if path.is_file():
        return _with_other_shards(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+\.safetensors)?", model) and not path.is_absolute():
        return _fetch_from_hub(model, text_encoder)
    raise InputError(
        f"{model}: no such model; give {', '.join(BUNDLED)}, a path to a .safetensors file or a "
        "folder of them, or a hub repository as org/name."
    )


def _bundled_path(name: str) -> Path:
    try:
        path = Path(str(importlib.resources.files("aiprod_nano") / BUNDLED[name]))
    except ModuleNotFoundError:
        raise InputError(
            f"{name}: its weights are not installed; run pip install packages/aiprod-nano, or give "
            "another --model."
        ) from None
    shipped = path.with_name(BUNDLED["nano"])
    if not shipped.is_file():
        raise InputError(f"{name}: {path.parent} has no {shipped.name}; give another --model.")
    if not path.is_file():
        raise InputError(
            f"{name}: to be made of nano; run `aiprod models convert nano {path.parent} --variant "
            f"{name.removeprefix('nano-')}`, a matter of seconds."
        )
    if path.stat().st_mtime < shipped.stat().st_mtime:
        raise InputError(f"{path}: made of an older nano; remove it and make it again.")
    return path


def is_installed(name: str) -> bool:
    try:
        return name in BUNDLED and _bundled_path(name).is_file()
    except InputError:
        return False


def _with_other_shards(path: Path) -> list[Path]:
    """All of `x-00001-of-00003.safetensors` and its siblings, for any one of them."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.safetensors)", path.name)
    if match is None:
        return [path]
    stem, count, suffix = match.groups()
    shards = [path.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent}: {len(missing)} of {int(count)} shards are missing: "
            f"{', '.join(missing[:3])}."
        )
    return shards


def _files_of_folder(folder: Path) -> list[Path]:
    """The files of the split layout, transformer first, or the folder's single model.

    LoRAs, upsamplers and other files that are no part of a base model are left out.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no .safetensors file in this folder.")
    kinds = {path: _components(open_checkpoint(path)) for path in files}
    with_transformer = [path for path in files if "transformer" in kinds[path]]
    if not with_transformer:
        raise CheckpointError(f"{folder}: none of its files holds a transformer.")
    chosen = _with_other_shards(with_transformer[0])
    if any(path not in chosen for path in with_transformer):
        names = ", ".join(path.name for path in with_transformer)
        raise InputError(f"{folder}: holds several models; give one of {names}.")
    have = set[str]().union(*(kinds[path] for path in chosen))
    for path in files:
        if path not in chosen and kinds[path] - have:
            have |= kinds[path]
            chosen.append(path)
    return chosen


def _fetch_from_hub(model: str, text_encoder: str | Path | None) -> list[Path]:
    """Downloads a model (or finds it in the cache), its header first.

    Raises InputError when the repository is unknown, gated, out of reach or holds several models.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    parts = model.split("/", 2)
    repo_id, file_name = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    api = HfApi()
    try:
        names = [n for n in api.list_repo_files(repo_id) if n.endswith(".safetensors")]
        file_name = file_name or _base_model_name(repo_id, names)
        header = api.parse_safetensors_file_metadata(repo_id, file_name)
        check_supported(
            Checkpoint(
                (Path(model),),
                {k: _parsed(v) for k, v in header.metadata.items()},
                {
                    key: TensorInfo(Path(file_name), tuple(info.shape), DTYPES[info.dtype])
                    for key, info in header.tensors.items()
                    if info.dtype in DTYPES
                },
            ),
            text_encoder,
        )
        return _with_other_shards(Path(hf_hub_download(repo_id, file_name)))
    except GatedRepoError as error:
        raise InputError(
            f"{repo_id}: access is gated; accept the licence on its page, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{model}: neither a file here nor a repository on the hub.") from error
    except Exception as error:
        if not (isinstance(error, HfHubHTTPError | OSError) or _is_http_client_error(error)):
            raise
        cached = _cached_file(repo_id, file_name)
        if cached is not None:
            logger.warning("%s: the hub is out of reach, using the cached %s", repo_id, cached.name)
            return _with_other_shards(cached)
        raise InputError(
            f"{model}: no such file here, and the hub is out of reach and its cache has no copy."
        ) from error


def _is_http_client_error(error: Exception) -> bool:
    # By name: the hub's client has used three HTTP libraries, and lets their errors through.
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests")


def _base_model_name(repo_id: str, names: list[str]) -> str:
    """The one file at the top of a repository that can be meant, preferring `-dev`."""
    top = [name for name in names if "/" not in name]
    for candidates in (top, [n for n in top if n.endswith("-dev.safetensors")]):
        if len(candidates) == 1:
            return candidates[0]
    if not top:
        raise InputError(f"{repo_id}: no .safetensors file at the top of this repository.")
    raise InputError(f"{repo_id}: holds several files; give one, e.g. {repo_id}/{top[0]}.")


def _cached_file(repo_id: str, file_name: str | None) -> Path | None:
    files = {name: path for repo, name, path in _cached_files() if repo == repo_id}
    if file_name is None and files:
        file_name = _base_model_name(repo_id, sorted(files))
    return files.get(file_name or "")


def _cached_files() -> list[tuple[str, str, Path]]:
    """(repository, file name in it, path) of every safetensors file in the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        (repo.repo_id, str(file.file_path.relative_to(revision.snapshot_path)), file.file_path)
        for repo in repositories
        for revision in repo.revisions
        for file in revision.files
        if file.file_name.endswith(".safetensors")
    ]


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


# What a header says.


def check_supported(checkpoint: Checkpoint, text_encoder: str | Path | None = None) -> None:
    """Raises CheckpointError, naming what is in the way, for a model that no pipeline can run.

    Every section of the config is read as the networks will read it, and the text encoder must be
    known, so that nothing is refused only after gigabytes.
    """
    name, config = checkpoint.paths[0], checkpoint.config  # refuses a LoRA, or no metadata
    found = _components(checkpoint)
    if "transformer" not in found:
        held = ", ".join(sorted(found)) or "nothing that belongs to a base model"
        raise CheckpointError(
            f"{name}: no transformer in this file (it holds {held}). Give the base model."
        )
    diffusion = next((key for key in config if "diffusion" in key), None)
    is_decoder_unknown = "vae" in config and "video decoder" not in found
    if diffusion or (checkpoint.version >= (2, 5) and is_decoder_unknown):
        raise CheckpointError(
            f"{name}: its video decoder is the diffusion decoder of LTX-2.5 "
            f"({diffusion or 'no vae.decoder tensors'}), which is not supported yet; give a model "
            "with the convolutional decoder."
        )
    networks.check_text_encoder(checkpoint, text_encoder)
    lacking = [part for part in ("video decoder", "text projection") if part not in found]
    if lacking:
        raise CheckpointError(
            f"{name}: no {' and no '.join(lacking)} in it. Give the whole model: the single file, "
            "or the folder that holds all of its parts."
        )
    TransformerConfig.from_metadata(checkpoint.section("transformer"))
    TextConfig.from_metadata(checkpoint.section("transformer"))
    VideoVAEConfig.from_metadata(checkpoint.section("vae"))
    if _has_sound(checkpoint):
        AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
        VocoderConfig.from_metadata(checkpoint.section("vocoder"))


def read_profile(checkpoint: Checkpoint) -> ModelProfile:
    """The grid, LTX-2's defaults by version, then the file's own `generation` metadata."""
    transformer = TransformerConfig.from_metadata(checkpoint.section("transformer"))
    video_vae = VideoVAEConfig.from_metadata(checkpoint.section("vae"))
    is_2_0 = checkpoint.version < (2, 3)
    num_layers = transformer.num_layers
    profile = ModelProfile(
        scale=video_vae.scale,
        num_inference_steps=40 if is_2_0 else 30,
        # A smaller model is perturbed at the same relative depth.
        stg_blocks=((29 if is_2_0 else 28) * num_layers // 48,),
        image_crf=18 if checkpoint.version >= (2, 4) else 33,
        num_layers=num_layers,
        has_audio=_has_sound(checkpoint),
    )
    generation = checkpoint.metadata.get("generation")
    return profile.replaced(generation) if isinstance(generation, dict) else profile


def _has_sound(checkpoint: Checkpoint) -> bool:
    return "audio_vae" in checkpoint.config and "vocoder" in checkpoint.config


def count_parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters by component, from the header. Connectors are not counted in the transformer."""
    counts = dict.fromkeys(COMPONENT_PREFIXES, 0)
    for key, info in checkpoint.tensors.items():
        component = _component_of(key)
        if component is not None:
            counts[component] += torch.Size(info.shape).numel()
    return {name: count for name, count in counts.items() if count}


def _components(checkpoint: Checkpoint) -> set[str]:
    if checkpoint.is_lora:
        return set()
    return {name for key in checkpoint.tensors if (name := _component_of(key)) is not None}


def _component_of(key: str) -> str | None:
    matches = [
        (len(prefix), name)
        for name, prefixes in COMPONENT_PREFIXES.items()
        for prefix in prefixes
        if key.startswith(prefix)
    ]
    return max(matches)[1] if matches else None


# For the command line.


def available_models() -> list[dict[str, Any]]:
    """Models that can be named without a path: shipped ones, and base models in the hub's cache."""
    found = []
    for name in BUNDLED:
        try:
            path = _bundled_path(name)
            parameters = sum(count_parameters(open_checkpoint(path)).values())
            entry = {"name": name, "bytes": path.stat().st_size, "parameters": parameters}
            note = "ships with AIPROD, runs on a CPU" if name == "nano" else "made of nano"
            found.append({**entry, "note": note})
        except InputError as error:
            note = str(error).removeprefix(f"{name}: ").split("; ")[0]
            found.append({"name": name, "bytes": None, "parameters": None, "note": note})
    for repo_id, file_name, path in _cached_files():
        try:
            checkpoint = open_checkpoint(path)
            if "transformer" in _components(checkpoint):
                entry = {"name": f"{repo_id}/{file_name}", "bytes": path.stat().st_size}
                entry["parameters"] = sum(count_parameters(checkpoint).values())
                found.append({**entry, "note": "in the hub cache"})
        except CheckpointError:
            continue  # half a download: it is not available
    return found


def describe_model(model: str) -> dict[str, Any]:
    """A model's version, grid, defaults, precision, parameters and scores, from its headers."""
    checkpoint = open_checkpoint(*resolve_model(model))
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    facts: dict[str, Any] = {
        "model": model,
        "files": [path.name for path in checkpoint.paths],
        "bytes": sum(path.stat().st_size for path in checkpoint.paths),
        "version": ".".join(map(str, checkpoint.version)) or "2.0 (none in the header)",
        "dtypes": dtypes,
        "text_encoder": (checkpoint.config.get("text_encoder") or {}).get("type", "gemma3"),
        "parameters": count_parameters(checkpoint),
        "defaults": {},
        "scores": checkpoint.metadata.get("scores") or {},  # of `aiprod eval`, where it was noted
    }
    if "transformer" not in checkpoint.config or "vae" not in checkpoint.config:
        return facts  # a part of a model: it has no grid or defaults of its own
    profile = read_profile(checkpoint)
    grid = profile.scale
    facts["grid"] = (
        f"{grid.time}k+1 frames, width a multiple of {grid.width}, height of {grid.height}"
    )
    facts["has_audio"] = profile.has_audio
    facts["defaults"] = {
        name: value._asdict() if isinstance(value, PerModality) else value
        for name, value in dataclasses.asdict(profile).items()
        if name not in ("scale", "num_layers", "has_audio")
    }
    return facts
