"""Making a clip again from the recipe that it carries, or saying what has changed since."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError
from aiprod_pipelines import recipe as recipes
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest


@dataclass
class Replay:
    """A recipe ready to be followed. `changed` are inputs that are not what they were: with any,
    the clip will be another. `noted` are circumstances that may show in the last bits."""

    recipe: dict[str, Any]
    pipeline: Pipeline
    request: GenerationRequest
    changed: list[str]
    noted: list[str]

    def run(self, progress: Progress | None = None) -> Clip:
        return self.pipeline.run(self.request, progress=progress)

    def is_same(self, clip: Clip) -> bool:
        """Whether the final latents are those of the recipe, bit for bit."""
        return clip.recipe["latents_sha256"] == self.recipe["latents_sha256"]


def open_replay(
    path: str | Path,
    *,
    model: str | None = None,
    text_encoder: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Replay:
    """Reads a clip's recipe, finds everything it names, and compares hashes; runs nothing.

    The options replace what the recipe says; `model` then stands for all parts of a split one.
    Files are looked for where they were, then beside the clip. Raises InputError for a clip without
    a recipe and for files that are not there.
    """
    recipe = recipes.read_recipe(path)
    if recipe["aiprod"] != recipes.FORMAT:
        raise InputError(
            f"{path}: its recipe has format {recipe['aiprod']}, this AIPROD reads "
            f"{recipes.FORMAT}; use the version that made it, "
            f"{recipe.get('versions', {}).get('aiprod-pipelines', 'a newer one')}."
        )
    places = {name: _find(name, Path(path).parent) for name in recipe["inputs"]}
    request = GenerationRequest.from_dict(_relocated(recipe["request"], places))
    encoder = recipe.get("text_encoder") or {}
    parts = [] if model else recipe["model"].get("other_parts", [])
    pipeline = find_pipeline(recipe["pipeline"]).from_model(
        model or recipe["model"]["name"],
        text_encoder=text_encoder or _still_there(encoder.get("source")),
        device=device or _device_of(recipe),
        dtype=dtype or recipe["computed_on"]["dtype"],
        quantization=recipe["computed_on"].get("quantization"),
        other_parts=[_find(part, Path(path).parent) for part in parts],
    )
    changed = [
        *_changed_files("model", recipe["model"]["files"], _model_files(pipeline.models)),
        *_changed_files(
            "text encoder",
            encoder.get("files", []),
            recipes.text_encoder_identity(pipeline.models.text_encoder_source).get("files", []),
        ),
        *(
            f"{name} has other contents"
            for name, digest in recipe["inputs"].items()
            if recipes.input_sha256(Path(places[name])) != digest
        ),
    ]
    return Replay(recipe, pipeline, request, changed, _noted(recipe, pipeline.models))


def _find(name: str, folder: Path) -> str:
    for place in (Path(name), folder / name, folder / Path(name).name):
        if place.is_file():
            return str(place)
    raise InputError(f"{name}: the clip was made with this file, which is not there any more.")


def _relocated(value: Any, places: dict[str, str]) -> Any:
    """A recipe's request with every path where it is now."""
    if isinstance(value, dict):
        return {key: _relocated(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_relocated(item, places) for item in value]
    return places.get(value, value) if isinstance(value, str) else value


def _device_of(recipe: dict[str, Any]) -> str | None:
    """The kind of device that the clip was made on, if there is one here; else the best."""
    import torch

    kind = recipe["computed_on"]["device"]
    is_here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return kind if is_here.get(kind) else None


def _still_there(source: str | None) -> str | None:
    """A text encoder's folder may have moved with its model; then the model finds it."""
    is_gone = source is not None and os.path.isabs(source) and not Path(source).exists()
    return None if is_gone else source


def _model_files(models: ModelSet) -> list[dict[str, Any]]:
    return [recipes.file_identity(path) for path in models.checkpoint.paths]


def _changed_files(what: str, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Names may differ, contents may not."""
    found = {recipes.contents_of(file) for file in now}
    return [
        f"{what} file {file['file']} has other contents"
        for file in before
        if recipes.contents_of(file) not in found
    ]


def _noted(recipe: dict[str, Any], models: ModelSet) -> list[str]:
    now = recipes.versions() | recipes.circumstances(models.device, models.dtype)
    before = {**recipe["versions"], **recipe["computed_on"]}
    return [
        f"{name} was {before[name]}, is {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]
