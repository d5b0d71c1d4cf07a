"""The `aiprod` command: parse, build a request, call what Python calls, write the file.

torch and the pipelines are imported inside the commands, so that help is there at once.
Exit codes: 0 done, 2 something the user can mend (one sentence on standard error), 130 interrupted,
1 anything else. Other packages add commands through the entry point group `aiprod.commands`: a
Typer app with a name becomes a group, one without adds its commands beside `generate`.
"""

import json
import os
import signal
import sys
from importlib.metadata import entry_points, version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aiprod_pipelines import analytics, commands
from aiprod_pipelines.catalog import PIPELINES
from aiprod_pipelines.terminal import (
    JsonFlag,
    ModelOption,
    check_output,
    explains_errors,
    print_table,
    size_text,
)

if TYPE_CHECKING:
    from aiprod_pipelines.pipeline import Pipeline
    from aiprod_pipelines.request import GenerationRequest

app = typer.Typer(
    name="aiprod",
    help="Clips with synchronised sound from a sentence, by LTX-2-family diffusion transformers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(commands.app)


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs the command and exits with its code."""
    # A terminated run must leave no half-written file either: unwind as for Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    for entry in entry_points(group="aiprod.commands"):
        app.add_typer(entry.load())
    app(args=argv)
    sys.exit(0)


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.")
    ] = False,
    no_analytics: Annotated[
        bool,
        typer.Option(
            "--no-analytics", help="Record nothing of this run; `aiprod stats` shows what is."
        ),
    ] = False,
) -> None:
    if no_analytics:
        os.environ["AIPROD_ANALYTICS"] = "off"  # of workers that are started too
    if show_version:
        typer.echo(f"aiprod {version('aiprod-pipelines')}")
        raise typer.Exit


@app.command()
@explains_errors
def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the clip shows and how it sounds.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The MP4 to write; an older one is replaced.")
    ] = Path("clip.mp4"),
    model: ModelOption = "nano",
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline",
            "-p",
            help=f"{', '.join(PIPELINES)}; `aiprod pipelines list` explains each.",
        ),
    ] = "one-stage",
    seed: Annotated[int, typer.Option(help="The same seed gives the same clip.")] = 10,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:FRAME[:STRENGTH]]",
            help="An image that the clip shows at a frame (default 0, the first), kept exactly at "
            "strength 1 (default). Repeat for more.",
        ),
    ] = None,
    keyframe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH:FRAME[:STRENGTH]",
            help="An image that the clip passes through (pipeline keyframes). Repeat for more.",
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=PATH[:STRENGTH]",
            help="A video or image to follow (pipeline ic-lora): canny, depth and pose are made "
            "from it; canny-made, depth-made, pose-made, detailer and reference show it as it is.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(metavar="CLIP", help="The clip to edit (pipelines retake and extend)."),
    ] = None,
    start_time: Annotated[
        float | None, typer.Option(help="Seconds; where a retake begins. Default: the start.")
    ] = None,
    end_time: Annotated[
        float | None, typer.Option(help="Seconds; where a retake ends. Default: the end.")
    ] = None,
    modality: Annotated[
        str, typer.Option(help="What a retake makes anew: video, audio or both.")
    ] = "both",
    audio: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A sound that the picture follows and the clip keeps: any file with a sound "
            "track. Cut to the clip's length, or followed by silence.",
        ),
    ] = None,
    audio_start_time: Annotated[
        float, typer.Option(help="Seconds of the sound that are skipped.")
    ] = 0.0,
    audio_prompt: Annotated[
        str | None, typer.Option(help="How the clip sounds; joined to the prompt.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:STRENGTH]", help="An adapter (default strength 1). Repeat."),
    ] = None,
    camera: Annotated[
        str | None,
        typer.Option(
            help="dolly-in, dolly-out, dolly-left, dolly-right, jib-up, jib-down or static: the "
            "camera LoRA beside the model."
        ),
    ] = None,
    spatial_upsampler: Annotated[
        Path | None,
        typer.Option(
            "--spatial-upsampler-path",
            metavar="FILE",
            help="The x2 upsampler of two-stage pipelines; default: the one beside the model.",
        ),
    ] = None,
    distilled_lora: Annotated[
        str | None,
        typer.Option(
            metavar="PATH[:STRENGTH]",
            help="For unguided stages of a model that is not distilled; default: beside it.",
        ),
    ] = None,
    skip_stage_2: Annotated[
        bool,
        typer.Option("--skip-stage-2", help="First stage only, at full size: needs no upsampler."),
    ] = False,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to steer away from; default: the model's.")
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(help="Length in frames, 8k+1 for LTX-2 (121 is 5 s at 24); default: model's."),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 32 for LTX-2; default: the model's.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 32 for LTX-2; default: the model's.")
    ] = None,
    frame_rate: Annotated[
        float | None, typer.Option(help="Frames per second; default: the model's.")
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--num-inference-steps", "--steps", help="More is slower; default: model's."),
    ] = None,
    cfg_scale: Annotated[
        str | None,
        typer.Option(
            metavar="N | video=N,audio=N",
            help="How strongly to follow the prompt; 1 is no guidance. LTX-2: video=3,audio=7.",
        ),
    ] = None,
    stg_scale: Annotated[
        str | None,
        typer.Option(
            metavar="N | video=N,audio=N",
            help="Spatio-temporal guidance (coherence); 0 is none. LTX-2: 1.",
        ),
    ] = None,
    modality_scale: Annotated[
        str | None,
        typer.Option(
            metavar="N | video=N,audio=N",
            help="How strongly picture and sound follow each other; 1 is no guidance. LTX-2: 3.",
        ),
    ] = None,
    rescale_scale: Annotated[
        str | None,
        typer.Option(
            metavar="N | video=N,audio=N",
            help="Keeps guided contrast in bounds; 0 to 1. LTX-2: 0.7.",
        ),
    ] = None,
    nag_scale: Annotated[
        str | None,
        typer.Option(
            metavar="N | video=N,audio=N",
            help="Negative prompts for distilled models (normalised attention guidance); 1 is "
            "none, 5 to 11 are usual.",
        ),
    ] = None,
    nag_tau: Annotated[
        float, typer.Option(help="How far nag-scale may lengthen what the text says.")
    ] = 2.5,
    nag_alpha: Annotated[float, typer.Option(help="Share of nag-scale's result, 0 to 1.")] = 0.25,
    guidance_interval: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="LOW HIGH", help="Guide only at noise levels (sigmas) from LOW to HIGH."
        ),
    ] = (0.0, 1.0),
    adaptive_guidance: Annotated[
        float,
        typer.Option(
            help="Leave out guidance passes once they agree with the prompt's to this cosine, such "
            "as 0.999; 1 never does."
        ),
    ] = 1.0,
    cache: Annotated[
        str,
        typer.Option(
            metavar="off | safe | fast",
            help="Forecast some of many steps instead of computing them; docs/memory.md says what "
            "it gains and costs.",
        ),
    ] = "off",
    sampler: Annotated[
        str | None,
        typer.Option(
            help="euler, euler-ancestral, ddim, gradient-estimation, heun, dpmpp-2m, dpmpp-2m-sde "
            "or res-2s; default: the pipeline's."
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="shifted, linear-quadratic, beta, karras or distilled; default: the pipeline's."
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(help="Guidance passes that go through the model at once; default: all."),
    ] = None,
    no_audio: Annotated[bool, typer.Option("--no-audio", help="Make a silent clip.")] = False,
    enlarge: Annotated[
        int, typer.Option(help="Whole factor by which the picture is enlarged for viewing.")
    ] = 1,
    enlarge_method: Annotated[
        str, typer.Option(help="bicubic, lanczos, or nearest (shows the model's own pixels).")
    ] = "bicubic",
    crf: Annotated[int, typer.Option(help="H.264 quality, 0 (lossless) to 51 (worst).")] = 19,
    tile: Annotated[
        str,
        typer.Option(
            metavar="auto | off | WxHxF",
            help="How the picture is decoded: in tiles that fit the free memory, whole, or in "
            "tiles of this width, height and length.",
        ),
    ] = "auto",
    decoder: Annotated[
        str,
        typer.Option(
            metavar="full | tiny",
            help="tiny is a preview's: a fraction of the time, softer; its file lies beside the "
            "model.",
        ),
    ] = "full",
    refine_tile: Annotated[
        str,
        typer.Option(
            metavar="auto | off | WxH",
            help="How much of the picture a second stage sees at once: what fits the free memory, "
            "all, or tiles of this width and height.",
        ),
    ] = "auto",
    window_frames: Annotated[
        int | None,
        typer.Option(
            help="Make a long clip in windows of so many frames (8k+1 for LTX-2), each going on "
            "from the one before; default: all at once."
        ),
    ] = None,
    window_overlap: Annotated[
        int | None,
        typer.Option(help="Frames that two windows share; default: a quarter of the window."),
    ] = None,
    best_of: Annotated[
        int,
        typer.Option(
            help="Try so many seeds, from --seed on; the reward model beside the model judges "
            "drafts of them, or their first steps, and the best is made. 4 cost 1.9 clips."
        ),
    ] = 1,
    heal: Annotated[
        bool,
        typer.Option(
            "--heal",
            help="Look for defects (frozen, black, grey, seams, clipping, silence, out of sync) "
            "and make the guilty spans anew.",
        ),
    ] = False,
    heal_budget: Annotated[int, typer.Option(help="Retakes that --heal makes at most.", min=1)] = 4,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Write an MP4 that plays while it grows; with `-o -` to a pipe."
        ),
    ] = False,
    enhance_prompt: Annotated[
        bool,
        typer.Option("--enhance-prompt", help="Let a language model fill in the prompt's details."),
    ] = False,
    enhancer: Annotated[
        str | None,
        typer.Option(
            metavar="auto | rules | gemma | URL | MODEL",
            help="Who does: the text encoder's own Gemma (rules for nano), a server with OpenAI's "
            "protocol, or a language model's folder or hub id. Implies --enhance-prompt.",
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub repository of the text encoder; default: `text_encoder` beside the "
            "model, else the one that the model was trained with."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: the best there is.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: float32 on cpu, else bfloat16."),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="fp8 | fp8-scaled-mm | int8 | int4",
            help="Store the transformer's large weights in fewer bits; default: as in the file.",
        ),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            metavar="auto | none | model | block | disk",
            help="Where weights wait: on the device, in main memory, the same block by block, or "
            "in the file. auto takes the first that fits; see `aiprod plan`.",
        ),
    ] = "auto",
    parallel: Annotated[
        str,
        typer.Option(
            metavar="none | sequence | guidance",
            help="How processes share the work: by tokens or by guidance pass; start them with "
            "torchrun --nproc-per-node N -m aiprod_pipelines.cli generate ...",
        ),
    ] = "none",
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="12GiB", help="What the run may hold of the device's memory."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A bundle of settings, under those given here; `aiprod presets list` shows them."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a clip with sound from a sentence.

    [dim]aiprod generate "a red rubber ball bounces on a grey floor" -o ball.mp4 --seed 7[/dim]
    [dim]aiprod generate "the ball rolls away" --image first.png -o roll.mp4 --enlarge 8[/dim]
    [dim]aiprod generate "rain on a tin roof" -m ltx-2-19b-dev.safetensors --num-frames 121[/dim]
    """
    if not (stream and str(output) == "-"):
        check_output(output, pipeline)
    options = locals()
    with analytics.run("generate", since_start=True):
        with analytics.span("open model"):
            opened, request = open_request(ctx, options)
        write_clip(
            opened,
            request,
            output,
            as_json=as_json,
            enhancer=enhancer or ("auto" if enhance_prompt else None),
            is_streamed=stream,
        )


def open_request(
    ctx: typer.Context, options: dict[str, Any]
) -> "tuple[Pipeline, GenerationRequest]":
    """The pipeline and the request of `generate`'s options; a preset fills those not given."""
    from aiprod_pipelines.catalog import find_pipeline
    from aiprod_pipelines.request import (
        ControlCondition,
        GenerationRequest,
        ImageCondition,
        LoraFile,
        PerModality,
    )

    options = dict(options)
    if options["preset"] is not None:
        from aiprod_pipelines.presets import resolve_preset

        chosen = resolve_preset(options["preset"], options["model"])
        for name, value in chosen.options.items():
            source = ctx.get_parameter_source(name)
            if source is None or source.name != "COMMANDLINE":
                options[name] = value
    scales: dict[str, Any] = {
        name: PerModality.parse(str(options[name]), f"--{name.replace('_', '-')}")
        for name in ("cfg_scale", "stg_scale", "modality_scale", "rescale_scale", "nag_scale")
        if options[name] is not None
    }
    lists = {
        "images": ("image", ImageCondition.parse),
        "keyframes": ("keyframe", ImageCondition.parse),
        "controls": ("control", ControlCondition.parse),
        "loras": ("lora", LoraFile.parse),
    }
    distilled_lora = options["distilled_lora"]
    request = GenerationRequest(
        **{name: options[name] for name in PLAIN_FIELDS},
        **{name: tuple(map(parse, options[flag] or ())) for name, (flag, parse) in lists.items()},
        generate_audio=not options["no_audio"],
        distilled_lora=LoraFile.parse(distilled_lora) if distilled_lora else None,
        step_cache=options["cache"],
        heal=options["heal_budget"] if options["heal"] else 0,
        **scales,
    )
    opened = find_pipeline(options["pipeline"]).from_model(
        options["model"],
        text_encoder=options["text_encoder"],
        device=options["device"],
        dtype=options["dtype"],
        quantization=options["quantization"],
        offload=options["offload"],
        max_memory=options["max_memory"],
        parallel=options["parallel"],
    )
    return opened, request


@app.command()
@explains_errors
def plan(**options: Any) -> None:
    """Say what a clip would take in memory and time, and where its weights would wait.

    Takes the options of `generate`, reads only headers, and computes nothing.
    [dim]aiprod plan "rain on a tin roof" -m ltx-2-19b-dev.safetensors --max-memory 24GiB[/dim]
    """
    from aiprod_pipelines.plan import make_plan

    opened, request = open_request(options["ctx"], options)
    found = make_plan(opened, request)
    if options["as_json"]:
        typer.echo(json.dumps(found.to_dict()))
        return
    rows = [
        (
            stage.name,
            size_text(stage.weight_bytes),
            size_text(stage.activation_bytes),
            f"{stage.flops / 1e12:.3g}",
            "unknown" if stage.seconds is None else f"{stage.seconds:.1f} s",
        )
        for stage in found.stages
    ]
    print_table(("stage", "weights", "activations", "TFLOP", "time"), rows)
    verdict = "fits" if found.fits else "does not fit"
    typer.echo(
        f"offload {found.offload}, guidance passes a call "
        f"{found.max_batch_size or 'all'}: peak {size_text(found.peak_bytes)} {verdict}, "
        f"{size_text(found.free_bytes)} free; about {found.seconds:.0f} s"
    )
    if not found.fits:
        raise typer.Exit(1)


# The same options by construction, help texts included.
plan.__signature__ = signature(generate)  # pyright: ignore[reportFunctionMemberAccess]
plan.__annotations__ = generate.__annotations__


# Options of `generate` that are fields of the request under the same name.
PLAIN_FIELDS = (
    "prompt", "negative_prompt", "seed", "height", "width", "num_frames", "frame_rate",
    "num_inference_steps", "source", "start_time", "end_time", "modality", "audio",
    "audio_start_time", "audio_prompt", "camera", "spatial_upsampler", "skip_stage_2",
    "guidance_interval", "adaptive_guidance", "nag_tau", "nag_alpha", "sampler", "schedule",
    "max_batch_size", "enlarge", "enlarge_method", "crf", "tile", "decoder", "refine_tile",
    "window_frames",
    "window_overlap", "best_of",
)  # fmt: skip


def write_clip(
    pipeline: "Pipeline",
    request: "GenerationRequest",
    output: Path,
    *,
    as_json: bool,
    enhancer: str | None = None,
    is_streamed: bool = False,
) -> None:
    """Makes a clip, writes it and says so. `enhancer` first rewrites the prompt."""
    import time

    started = time.monotonic()
    with analytics.span("plan"):
        from aiprod_pipelines.plan import learn, settle
        from aiprod_pipelines.progress import RichProgress

        progress = RichProgress()
    is_piped = is_streamed and str(output) == "-"
    if not is_piped:
        check_output(output, pipeline.name)
    if enhancer is not None:
        from aiprod_pipelines.prompt_enhancer import enhance_request

        request = enhance_request(pipeline.models, request, enhancer, progress)
    from aiprod_core.parallel import is_first

    with analytics.span("plan"):
        request, plan = settle(pipeline, request, progress)
    clip = pipeline.run(request, progress=progress, is_streamed=is_streamed)
    if not is_first():
        return  # another process writes the same clip
    if is_streamed:
        from aiprod_pipelines.streaming import write_stream

        written = write_stream(clip.stream(), output, started=started)
        extra: dict[str, Any] = {"first_segment_s": round(written.first_segment_s, 3)}
    else:
        clip.save(output)
        extra = {}
    if plan is not None:
        learn(plan, clip.progress.seconds, pipeline.models)
    report = clip.report(output) | extra
    if as_json:
        # Standard output is the clip's own where it is piped.
        typer.echo(json.dumps(report), err=is_piped)
        return
    parts = []
    if report["width"]:
        size, rate = f"{report['width']}x{report['height']}", f"{report['frame_rate']:g} fps"
        parts.append(f"{size}, {report['num_frames']} frames at {rate}")
    if report["audio_sample_rate"]:
        parts.append(f"{report['audio_sample_rate']} Hz sound")
    seconds = sum(clip.progress.seconds.values())
    summary = f"{', '.join(parts)}, seed {request.seed}, {seconds:.1f} s"
    typer.echo(f"{output}: {summary}", err=is_piped)


if __name__ == "__main__":
    main()
