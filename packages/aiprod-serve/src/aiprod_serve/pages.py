"""The studio: a page at /studio/, served as files, and what it asks beyond the public API.

The page is plain HTML, CSS and modules in studio/, with nothing from elsewhere: its policy lets it
talk to this server alone. It holds no right of its own; with keys in use it asks for one.
"""

from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from fastapi.responses import RedirectResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from aiprod_core.components.samplers import SAMPLERS
from aiprod_core.errors import InputError
from aiprod_pipelines import companions
from aiprod_pipelines.catalog import PIPELINES
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.presets import PRESETS, resolve_preset
from aiprod_pipelines.recipe import read_recipe
from aiprod_pipelines.request import (
    CONTROL_KINDS,
    SCHEDULE_NAMES,
    STEP_CACHES,
    GenerationRequest,
    ModelProfile,
)
from aiprod_serve.context import ERRORS, Context, Reader, Served
from aiprod_serve.errors import ApiError
from aiprod_serve.files import VIDEO
from aiprod_serve.schemas import (
    Choices,
    Frame,
    PerModalityScale,
    PipelineChoice,
    PresetChoice,
    Recipe,
    RequestLimits,
)

router = APIRouter(responses=ERRORS, tags=["Studio"])

FOLDER = Path(__file__).with_name("studio")

# What is fetched becomes blob: URLs, for images and players cannot send a key.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# Options of `aiprod generate` that requests know by another name; others are the operator's.
FIELDS = {"cache": "step_cache", "crf": "crf", "pipeline": "pipeline",
          "skip_stage_2": "skip_stage_2", "num_inference_steps": "num_inference_steps"}  # fmt: skip


class Pages(StaticFiles):
    """The page's files under its own policy; browsers ask each time whether they have changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["content-security-policy"] = POLICY
        response.headers["cache-control"] = "no-cache"
        return response


def studio() -> Pages:
    return Pages(directory=FOLDER, html=True)


@router.get("/", include_in_schema=False)
async def to_studio() -> RedirectResponse:
    return RedirectResponse("/studio/")


@router.get("/v1/models/{model}/choices", response_model=Choices)
def get_choices(served: Served, caller: Reader, model: str) -> Choices:
    """What can be asked of a model here: presets, pipelines, cameras, controls, limits."""
    if model not in served.settings.models:
        raise ApiError(404, "no such model; see /v1/models.", code="model_not_found")
    models, settings = served.models, served.settings
    usual = models.pipeline(model, settings.pipeline)
    profile = usual.profile(GenerationRequest("-"))
    controls = _controls(usual)
    names = [name for name in models.pipelines(model) if controls or name != "ic-lora"]
    return Choices(
        model=model,
        default_pipeline=settings.pipeline,
        num_frames=profile.num_frames,
        frame_rate=profile.frame_rate,
        grid_frames=profile.scale.time,
        has_audio=profile.has_audio,
        presets=_presets(served, model),
        pipelines=[_pipeline(models.pipeline(model, name)) for name in names],
        camera_motions=list(models.camera_motions(model)),
        controls=controls,
        samplers=list(SAMPLERS),
        schedules=list(SCHEDULE_NAMES),
        step_caches=list(STEP_CACHES),
        cfg_scale=PerModalityScale(**profile.cfg_scale._asdict()),
        limits=RequestLimits(
            max_clip_s=settings.max_clip_s,
            max_pixels=settings.max_pixels,
            max_steps=settings.max_steps,
            max_prompt_chars=settings.max_prompt_chars,
            max_upload_mb=settings.max_upload_mb,
        ),
    )


@router.get("/v1/videos/{video_id}/recipe", response_model=Recipe)
async def get_recipe(served: Served, caller: Reader, video_id: str) -> Recipe:
    """All that a clip was made from, as its file carries it."""
    job = await to_thread.run_sync(served.job, video_id, caller.owner)
    if job.status != "completed":
        raise ApiError(409, f"the video is {job.status}.", code="not_completed")
    try:
        recipe = await to_thread.run_sync(read_recipe, served.files.result(job) / VIDEO)
    except InputError:  # it expires just now; the message would name a path of this machine
        raise ApiError(404, "no such video, or it has expired.", code="video_not_found") from None
    return Recipe.model_validate(recipe)


def _presets(served: Context, model: str) -> list[PresetChoice]:
    """Those that this model can be run with, and that say nothing of the server's memory."""
    choices = []
    for name, preset in PRESETS.items():
        try:
            options = resolve_preset(
                name,
                served.settings.models[model],
                text_encoder=served.settings.text_encoder,
            ).options
        except InputError:
            continue
        if not options.keys() <= FIELDS.keys():
            continue
        settings = {FIELDS[option]: value for option, value in options.items()}
        pipeline = served.models.pipeline(model, settings["pipeline"])
        is_skipped = settings.get("skip_stage_2", False)
        frame = _frame(pipeline.profile(GenerationRequest("-", skip_stage_2=is_skipped)))
        frame.num_inference_steps = settings.get("num_inference_steps", frame.num_inference_steps)
        choices.append(
            PresetChoice(name=name, summary=preset.summary, settings=settings, frame=frame)
        )
    return choices


def _pipeline(pipeline: Pipeline) -> PipelineChoice:
    return PipelineChoice(
        name=pipeline.name,
        summary=PIPELINES[pipeline.name].summary,
        takes=sorted(pipeline.takes),
        needs=sorted(pipeline.needs),
        frame=_frame(pipeline.profile(GenerationRequest("-"))),
    )


def _frame(profile: ModelProfile) -> Frame:
    return Frame(
        width=profile.width,
        height=profile.height,
        grid_width=profile.scale.width,
        grid_height=profile.scale.height,
        num_inference_steps=profile.num_inference_steps,
    )


def _controls(pipeline: Pipeline) -> list[str]:
    """The kinds of reference whose IC-LoRA lies beside the model."""
    kinds = []
    for kind in CONTROL_KINDS:
        try:
            companions.ic_lora(pipeline.models.checkpoint, kind)
        except InputError:
            continue
        kinds.append(kind)
    return kinds
