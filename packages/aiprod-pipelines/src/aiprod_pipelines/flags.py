"""The flags that LTX-2's users type: `python -m aiprod_pipelines.distilled --prompt ... `.

One table maps them to fields of the request, or to how the model is opened; all pipelines share it.
`aiprod generate` has shorter spellings of the same fields.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import typer

from aiprod_core.errors import InputError
from aiprod_pipelines import analytics

if TYPE_CHECKING:
    from aiprod_pipelines.pipeline import Pipeline

MODEL_OPTIONS = (
    "model", "text_encoder", "other_parts", "device", "dtype", "quantization", "offload",
    "max_memory",
)  # fmt: skip


class Flag(NamedTuple):
    name: str
    target: str  # a field of GenerationRequest, one half of it (cfg_scale.video), or a model option
    kind: Callable[[str], Any] = str
    values: str = ""  # placeholders where it takes more than one; the last in [] may be left out
    repeats: bool = False
    help: str = ""


FLAGS = (
    # Models.
    Flag("--checkpoint-path", "model", help="the model: a file, a folder, a name"),
    Flag("--distilled-checkpoint-path", "model", help="the same, for the distilled pipelines"),
    Flag("--transformer-path", "model", help="the transformer's file of a split model"),
    Flag("--video-vae-path", "other_parts", Path, repeats=True, help="of a split model"),
    Flag("--audio-vae-path", "other_parts", Path, repeats=True, help="of a split model"),
    Flag("--text-encoder-path", "text_encoder", help="folder or hub repository"),
    Flag("--gemma-root", "text_encoder", help="the same"),
    Flag("--spatial-upsampler-path", "spatial_upsampler", Path, help="default: beside the model"),
    Flag("--distilled-lora", "distilled_lora", values="PATH [STRENGTH]", help="default: beside it"),
    Flag("--lora", "loras", values="PATH [STRENGTH]", repeats=True),
    Flag("--camera", "camera", help="dolly-in, jib-up, ...; its LoRA lies beside it"),
    # Request.
    Flag("--prompt", "prompt"),
    Flag("--negative-prompt", "negative_prompt"),
    Flag("--audio-prompt", "audio_prompt", help="how it sounds; joined to the prompt"),
    Flag("--seed", "seed", int),
    Flag("--height", "height", int),
    Flag("--width", "width", int),
    Flag("--num-frames", "num_frames", int),
    Flag("--frame-rate", "frame_rate", float),
    Flag("--num-inference-steps", "num_inference_steps", int),
    Flag("--image", "images", values="PATH FRAME STRENGTH", repeats=True),
    Flag("--sampler", "sampler"),
    Flag("--schedule", "schedule"),
    # Guidance.
    Flag("--video-cfg-guidance-scale", "cfg_scale.video", float),
    Flag("--audio-cfg-guidance-scale", "cfg_scale.audio", float),
    Flag("--video-stg-guidance-scale", "stg_scale.video", float),
    Flag("--audio-stg-guidance-scale", "stg_scale.audio", float),
    Flag("--video-rescale-scale", "rescale_scale.video", float),
    Flag("--audio-rescale-scale", "rescale_scale.audio", float),
    Flag("--a2v-guidance-scale", "modality_scale.video", float),
    Flag("--v2a-guidance-scale", "modality_scale.audio", float),
    Flag("--video-skip-step", "skip_step.video", int),
    Flag("--audio-skip-step", "skip_step.audio", int),
    Flag("--video-stg-blocks", "stg_blocks", int, values="BLOCK ..."),
    Flag("--audio-stg-blocks", "stg_blocks", int, values="BLOCK ...", help="the same blocks"),
    Flag("--nag-scale", "nag_scale", float, help="negative prompts without cfg; 1 is off"),
    Flag("--nag-tau", "nag_tau", float),
    Flag("--nag-alpha", "nag_alpha", float),
    # Control.
    Flag("--video-conditioning", "controls", values="PATH STRENGTH", repeats=True),
    Flag("--reference-video", "controls", values="PATH", repeats=True),
    Flag("--reference-strength", "reference_strength", float),
    Flag("--video-path", "source", Path, help="the clip to edit"),
    Flag("--start-time", "start_time", float, help="seconds"),
    Flag("--end-time", "end_time", float, help="seconds"),
    Flag("--modality", "modality", help="what a retake makes anew: video, audio or both"),
    Flag("--audio-path", "audio", Path, help="a sound that the picture follows"),
    Flag("--audio-start-time", "audio_start_time", float, help="seconds of it that are skipped"),
    # Running.
    Flag("--window-frames", "window_frames", int, help="of a long clip that are made at once"),
    Flag("--window-overlap", "window_overlap", int, help="frames that two windows share"),
    Flag("--best-of", "best_of", int, help="seeds of which the best is finished"),
    Flag("--refine-tile", "refine_tile", help="second stage: auto, off or WxH"),
    Flag("--max-batch-size", "max_batch_size", int, help="guidance passes a model call"),
    Flag("--cache", "step_cache", help="steps forecast instead of computed: off, safe or fast"),
    Flag("--quantization", "quantization", help="fp8-cast (fp8), fp8-scaled-mm, int8 or int4"),
    Flag("--offload", "offload", help="none, model, block (cpu) or disk"),
    Flag("--max-memory", "max_memory", help="of the device, such as 12GiB"),
    Flag("--tile", "tile", help="decoding: auto, off or WxHxF"),
    Flag("--decoder", "decoder", help="full, or tiny for a preview"),
    Flag("--device", "device"),
    Flag("--dtype", "dtype"),
)


def main(pipeline: "type[Pipeline]", arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one pipeline from LTX-2's command line and exits with its code."""
    from aiprod_pipelines.terminal import explains_errors

    parser = argument_parser(pipeline)
    given = vars(parser.parse_args(arguments))
    try:
        explains_errors(_run)(pipeline, given)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    sys.exit(0)


def argument_parser(pipeline: "type[Pipeline]") -> argparse.ArgumentParser:
    from aiprod_pipelines.catalog import PIPELINES

    parser = argparse.ArgumentParser(
        prog=f"python -m aiprod_pipelines.{PIPELINES[pipeline.name].module}",
        description=PIPELINES[pipeline.name].summary,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--output-path", type=Path, required=True, help="the file to write")
    for flag in FLAGS:
        options: dict[str, Any] = {"help": flag.help, "type": flag.kind, "dest": flag.name}
        if flag.values:
            names = flag.values.split()
            is_open = names[-1].startswith(("[", "."))
            options["nargs"] = "+" if is_open else len(names)
            options["metavar"] = tuple(names) if not is_open else "VALUE"
        if flag.repeats:
            options["action"] = "append"
        if flag.name == "--prompt":
            options["required"] = True
        parser.add_argument(flag.name, **options)
    parser.add_argument("--no-audio", action="store_true", default=False)
    parser.add_argument("--skip-stage-2", action="store_true", default=False)
    parser.add_argument("--enhance-prompt", action="store_true", default=False)
    parser.add_argument(
        "--enhancer", help="auto, rules, gemma, a URL or a model; implies --enhance-prompt"
    )
    parser.add_argument("--stream", action="store_true", default=False, help="plays as it grows")
    parser.add_argument("--json", action="store_true", default=False)
    return parser


def _run(pipeline: "type[Pipeline]", given: dict[str, Any]) -> None:
    from aiprod_pipelines.cli import write_clip
    from aiprod_pipelines.request import GenerationRequest, PerModality

    with analytics.run("generate", since_start=True):
        settings, halves = collect(given)
        options = {name: settings.pop(name) for name in MODEL_OPTIONS if name in settings}
        with analytics.span("open model"):
            opened = pipeline.from_model(**options)
        plain = GenerationRequest(
            **settings, generate_audio=not given["no_audio"], skip_stage_2=given["skip_stage_2"]
        )
        # A half that is not given keeps its default.
        profile = opened.profile(plain)
        for name, values in halves.items():
            default: PerModality = getattr(profile, name, plain.skip_step)
            plain = dataclasses.replace(plain, **{name: default._replace(**values)})
        write_clip(
            opened,
            plain,
            given["output_path"],
            as_json=given["json"],
            enhancer=given.get("enhancer") or ("auto" if given["enhance_prompt"] else None),
            is_streamed=given["stream"],
        )


def collect(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What was typed, as fields and model options, and as halves of per-modality fields.

    Raises InputError for two flags that say different things of one field.
    """
    settings: dict[str, Any] = {}
    halves: dict[str, dict[str, Any]] = {}
    for flag in FLAGS:
        if flag.name not in given:
            continue
        value = given[flag.name]
        field, _, half = flag.target.partition(".")
        if half:
            halves.setdefault(field, {})[half] = value
        elif flag.repeats:
            values = [_with_numbers(flag, item) for item in value] if flag.values else value
            settings[field] = (*settings.get(field, ()), *values)
        elif settings.setdefault(field, _with_numbers(flag, value)) != _with_numbers(flag, value):
            raise InputError(f"{flag.name} {value} contradicts another flag for {field}; give one.")
    strength = settings.pop("reference_strength", None)
    if strength is not None:
        controls = settings.get("controls", ())
        settings["controls"] = tuple((*control[:2], strength) for control in controls)
    return settings, halves


def _with_numbers(flag: Flag, value: Any) -> Any:
    """The values of one use of a flag: PATH NUMBER..., with the kind of control before them."""
    if not flag.values or flag.kind is not str:
        return tuple(value) if isinstance(value, list) else value
    path, *texts = value
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        raise InputError(f"{flag.name} is {flag.values}; got {' '.join(value)}.") from None
    if len(value) > len(flag.values.split()):
        raise InputError(f"{flag.name} is {flag.values}; got {' '.join(value)}.")
    if flag.target == "images" and numbers[0] == int(numbers[0]):
        numbers[0] = int(numbers[0])
    return ("reference", path, *numbers) if flag.target == "controls" else (path, *numbers)
