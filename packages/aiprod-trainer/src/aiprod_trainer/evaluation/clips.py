"""The clips of an evaluation: made once, kept as MP4 files with their recipes, gone on with."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from aiprod_core.errors import InputError
from aiprod_pipelines import analytics
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.recipe import file_identity, read_recipe
from aiprod_pipelines.request import GenerationRequest
from aiprod_trainer.evaluation.prompts import Prompt

LOOKED_AT = 128  # pixels; smaller pictures are enlarged, or 4:2:0 colour would blur them
CRF = 12  # finer than for viewing: the file is what is judged


def open_pipeline(model: str, pipeline: str, **options: Any) -> Pipeline:
    """A pipeline that makes clips from text alone. Raises InputError for another."""
    found = find_pipeline(pipeline)
    if found.needs:
        raise InputError(
            f"{pipeline} needs {', '.join(found.needs)}; evaluate one from text alone."
        )
    return found.from_model(model, **options)


def make_clips(
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    seed: int,
    settings: dict[str, Any],
) -> list[Path]:
    """Writes `0000.mp4`, ... with seeds `seed`, `seed + 1`, ... and returns them.

    A clip that is there and carries the recipe that would be followed now is kept, so a run that
    was stopped goes on; any other is made anew. Raises InputError for a setting before the first
    clip is made, and where another run has replaced clips by its own meanwhile.
    """
    requests = [
        _request(pipeline, prompt.text, seed + number, settings)
        for number, prompt in enumerate(prompts)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.mp4" for number in range(len(requests))]
    is_made = _recogniser(pipeline)
    written = {p: p.stat() for p, r in zip(paths, requests, strict=True) if is_made(p, r)}
    missing = [(p, r) for p, r in zip(paths, requests, strict=True) if p not in written]
    console = Console(stderr=True, highlight=False)
    if missing and written:
        console.print(f"{folder}: {len(written)} clips are there already")
    for path, request in track(missing, f"clips of {pipeline.models.name}", console=console):
        with analytics.run("eval"):
            pipeline.run(request).save(path)
        written[path] = path.stat()
    # Not by their recipes: best-of's and healing's name what came of the request.
    strange = [p.name for p in paths if _version(p.stat()) != _version(written[p])]
    if strange:
        raise InputError(
            f"{folder}: another run wrote there; {len(strange)} of {len(paths)} clips are not "
            f"those asked for, such as {strange[0]}. Start again, with a --clips-dir for each run."
        )
    return paths


def _version(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _request(
    pipeline: Pipeline, text: str, seed: int, settings: dict[str, Any]
) -> GenerationRequest:
    """Resolved, as the recipe will hold it."""
    request = GenerationRequest.from_dict({"crf": CRF, **settings, "prompt": text, "seed": seed})
    request = pipeline.resolve(request)
    side = min(request.shape.height, request.shape.width)
    enlarge = max(-(-LOOKED_AT // side), request.enlarge)
    return dataclasses.replace(request, enlarge=enlarge, enlarge_method="nearest")


def _recogniser(pipeline: Pipeline) -> Callable[[Path, GenerationRequest], bool]:
    """Tells whether a file is the clip that this pipeline would make of a request."""
    model = [file_identity(path) for path in pipeline.models.checkpoint.paths]

    def is_made(path: Path, request: GenerationRequest) -> bool:
        if not path.is_file():
            return False
        try:
            recipe = read_recipe(path)
        except InputError:
            return False
        return (
            recipe["pipeline"] == pipeline.name
            and recipe["model"]["files"] == model
            and recipe["request"] == request.to_dict()
        )

    return is_made
