"""Presets: settings of `aiprod generate` under one name, as a table.

A preset says what is wanted; which pipeline does it depends on what lies beside the model, so each
has a first choice and others, and the first that this model can run is taken, which `explain` says.
What is given on the command line stands over a preset. Memory is no part of it: where weights wait
is for the flight plan to say, on this machine, unless a preset is made for small memory.
"""

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from aiprod_core.errors import InputError

if TYPE_CHECKING:
    from aiprod_pipelines.components import ModelSet
    from aiprod_pipelines.plan import Plan

Options = dict[str, Any]


class Preset(NamedTuple):
    summary: str
    options: Options  # of `aiprod generate`, by the names of its parameters
    ways: tuple[Options, ...]  # how it is done, the best first: pipeline and what goes with it


PRESETS = {
    "draft": Preset(
        "To see whether a prompt works: few steps, the first stage only.",
        {},
        (
            {"pipeline": "distilled", "skip_stage_2": True},
            {"pipeline": "one-stage", "num_inference_steps": 12, "cache": "fast"},
        ),
    ),
    "fast": Preset(
        "Few steps at full size: distilled where the model has what that needs, else 20 guided.",
        {},
        (
            {"pipeline": "distilled"},
            {"pipeline": "distilled", "skip_stage_2": True},
            {"pipeline": "one-stage", "num_inference_steps": 20, "cache": "safe"},
        ),
    ),
    "standard": Preset(
        "The model's own defaults, guided.",
        {},
        ({"pipeline": "two-stages"}, {"pipeline": "one-stage"}),
    ),
    "production": Preset(
        "For the final clip: second-order steps or more of them, a finer file.",
        {"crf": 14},
        (
            {"pipeline": "two-stages-hq"},
            {"pipeline": "two-stages", "num_inference_steps": 40},
            {"pipeline": "one-stage", "num_inference_steps": 40},
        ),
    ),
    "low-memory": Preset(
        "The smallest footprint: blocks from the file, one guidance pass at a time, small tiles.",
        {"offload": "disk", "max_batch_size": 1},
        ({"pipeline": "distilled"}, {"pipeline": "one-stage"}),
    ),
}


@dataclass(frozen=True)
class Resolved:
    """A preset for one model: what it sets, and why the ways before were not taken."""

    name: str
    options: Options
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # way, reason


def resolve_preset(name: str, model: str = "nano", *, text_encoder: str | None = None) -> Resolved:
    """The first way of a preset that the model can run; reads headers only.

    Raises InputError for an unknown name, and where no way is left.
    """
    from aiprod_pipelines.components import ModelSet

    preset = PRESETS.get(name)
    if preset is None:
        near = difflib.get_close_matches(name, PRESETS, 1, cutoff=0.4)
        hint = f", try {near[0]}" if near else ""
        raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {name}{hint}.")
    passed_over = []
    for way in preset.ways:
        options = {**preset.options, **way}
        models = ModelSet.open(
            model, text_encoder=text_encoder, prefers_distilled=_is_distilled(way)
        )
        reason = _what_is_missing(options, models)
        if reason is None:
            return Resolved(name, options, passed_over)
        passed_over.append((way_text(way), reason))
    reasons = "; ".join(f"{way}: {reason}" for way, reason in passed_over)
    raise InputError(f"preset {name} cannot be had with {model}: {reasons}")


def plan_here(resolved: Resolved, model: str) -> "Plan":
    """What a clip of the model's own size would take on this machine under a preset."""
    from aiprod_pipelines.catalog import find_pipeline
    from aiprod_pipelines.plan import make_plan
    from aiprod_pipelines.request import GenerationRequest

    settings = dict(resolved.options)
    pipeline, offload = settings.pop("pipeline"), settings.pop("offload", "auto")
    request = GenerationRequest("a clip", step_cache=settings.pop("cache", "off"), **settings)
    return make_plan(find_pipeline(pipeline).from_model(model, offload=offload), request)


def way_text(options: Options) -> str:
    """As one would type it: `--pipeline distilled --skip-stage-2`."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def _is_distilled(way: Options) -> bool:
    return way["pipeline"] == "distilled"


def _what_is_missing(way: Options, models: "ModelSet") -> str | None:
    """Why a model cannot be run in this way, or None."""
    from aiprod_pipelines import companions
    from aiprod_pipelines.catalog import find_pipeline

    pipeline = find_pipeline(way["pipeline"])
    has_stage_2 = pipeline.has_stage_2 and not way.get("skip_stage_2", False)
    try:
        if has_stage_2:
            companions.spatial_upsampler(models.checkpoint, None)
        if (has_stage_2 or pipeline.is_distilled) and not models.is_distilled:
            lora = companions.distilled_lora(models.checkpoint, None)
            if way.get("offload") == "disk":
                return f"{lora.path.name} cannot be added to weights that stay in the file"
    except InputError as error:
        return str(error)
    return None
