"""Scores of finished files: a clip is encoded by the model's own codecs and judged as latents."""

from dataclasses import replace
from pathlib import Path

from aiprod_core.types import AV
from aiprod_pipelines import encoding, media, stages
from aiprod_pipelines.best_of import open_verdict
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.recipe import read_recipe
from aiprod_pipelines.request import GenerationRequest


def prompt_of(path: Path) -> str:
    """What the clip's recipe was asked for. Raises InputError for a file without a recipe."""
    return GenerationRequest.from_dict(read_recipe(path)["request"]).text


def score_file(
    models: ModelSet,
    path: Path,
    prompt: str | None = None,  # default: that of the file's recipe
    *,
    reward: Path | None = None,  # default: the reward model beside the model
    progress: Progress | None = None,
) -> dict[str, float]:
    """A log odds for each axis that the file can be judged on, and their sum as `overall`.

    The picture is brought to the model's grid at its own rate of frames. Raises InputError for a
    file without picture, and without a prompt.
    """
    progress = progress or Progress()
    verdict = open_verdict(models, prompt or prompt_of(path), reward)
    request = GenerationRequest(prompt=prompt or prompt_of(path), source=path)
    info = media.probe(path)
    request = replace(request, generate_audio=info.audio_codec is not None)
    request = encoding.fitted_to_source(request, models.profile.scale).resolved(models.profile)
    latents = encoding.encode_source(models, request, progress, is_whole=True)
    states = stages.initial_states(models, request, latents)
    scores = verdict(AV(latents.video, latents.audio), 0.0, states.video_grid, states.audio_grid)
    return scores | {"overall": sum(scores.values())}
