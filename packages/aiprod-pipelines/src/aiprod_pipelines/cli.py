"""The `aiprod` command: parse, build a request, call what Python calls, write the file.

torch and the pipelines are imported inside the commands, so that help is there at once.
Exit codes: 0 done, 2 something the user can mend (one sentence on standard error), 130 interrupted,
1 anything else. Other packages add commands through the entry point group `aiprod.commands`: a Typer
app with a name becomes a group, one without adds its commands beside `generate`.
"""

import functools
import json
import signal
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aiprod_pipelines.catalog import PIPELINES

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
models_app = typer.Typer(help="What models are here, and what is in them.", no_args_is_help=True)
app.add_typer(models_app, name="models")
pipelines_app = typer.Typer(help="The ways to make a clip.", no_args_is_help=True)
app.add_typer(pipelines_app, name="pipelines")

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Make the last line of standard output one JSON object.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="`nano` (ships with AIPROD), a .safetensors file or folder, or a hub repository "
        "as org/name or org/name/file.safetensors.",
    ),
]


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs the command and exits with its code."""
    # A terminated run must leave no half-written file either: unwind as for Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    for entry in entry_points(group="aiprod.commands"):
        app.add_typer(entry.load())
    app(args=argv)
    sys.exit(0)


def explains_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what a user can mend into one sentence and exit code 2, and Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from aiprod_core.errors import InputError

        try:
            command(*args, **kwargs)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: nothing was written", err=True)
            raise typer.Exit(130) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            typer.echo(
                "error: out of memory; try fewer frames (--num-frames) or a smaller picture "
                f"(--width, --height). {error}".splitlines()[0],
                err=True,
            )
            raise typer.Exit(1) from None

    return wrapped


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.")
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"aiprod {version('aiprod-pipelines')}")
        raise typer.Exit


@app.command()
@explains_errors
def generate(
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
        str,
        typer.Option(
            metavar="auto | rules | gemma | URL | MODEL",
            help="Who does: the text encoder's own Gemma (rules for nano), a server with OpenAI's "
            "protocol, or a language model's folder or hub id.",
        ),
    ] = "auto",
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
    as_json: JsonFlag = False,
) -> None:
    """Make a clip with sound from a sentence.

    [dim]aiprod generate "a red rubber ball bounces on a grey floor" -o ball.mp4 --seed 7[/dim]
    [dim]aiprod generate "the ball rolls away" --image first.png -o roll.mp4 --enlarge 8[/dim]
    [dim]aiprod generate "rain on a tin roof" -m ltx-2-19b-dev.safetensors --num-frames 121[/dim]
    """
    from aiprod_pipelines.catalog import find_pipeline
    from aiprod_pipelines.request import (
        ControlCondition,
        GenerationRequest,
        ImageCondition,
        LoraFile,
        PerModality,
    )

    if not (stream and str(output) == "-"):
        check_output(output, pipeline)
    scales: dict[str, Any] = {
        name: PerModality.parse(text, f"--{name.replace('_', '-')}")
        for name, text in (
            ("cfg_scale", cfg_scale),
            ("stg_scale", stg_scale),
            ("modality_scale", modality_scale),
            ("rescale_scale", rescale_scale),
            ("nag_scale", nag_scale),
        )
        if text is not None
    }
    request = GenerationRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        height=height,
        width=width,
        num_frames=num_frames,
        frame_rate=frame_rate,
        num_inference_steps=num_inference_steps,
        images=tuple(ImageCondition.parse(text) for text in image or ()),
        keyframes=tuple(ImageCondition.parse(text) for text in keyframe or ()),
        controls=tuple(ControlCondition.parse(text) for text in control or ()),
        source=source,
        start_time=start_time,
        end_time=end_time,
        modality=modality,
        audio=audio,
        audio_start_time=audio_start_time,
        audio_prompt=audio_prompt,
        generate_audio=not no_audio,
        loras=tuple(LoraFile.parse(text) for text in lora or ()),
        camera=camera,
        spatial_upsampler=spatial_upsampler,
        distilled_lora=LoraFile.parse(distilled_lora) if distilled_lora else None,
        skip_stage_2=skip_stage_2,
        guidance_interval=guidance_interval,
        nag_tau=nag_tau,
        nag_alpha=nag_alpha,
        sampler=sampler,
        schedule=schedule,
        max_batch_size=max_batch_size,
        enlarge=enlarge,
        enlarge_method=enlarge_method,
        crf=crf,
        tile=tile,
        refine_tile=refine_tile,
        window_frames=window_frames,
        window_overlap=window_overlap,
        **scales,
    )
    opened = find_pipeline(pipeline).from_model(
        model, text_encoder=text_encoder, device=device, dtype=dtype
    )
    write_clip(
        opened,
        request,
        output,
        as_json=as_json,
        enhancer=enhancer if enhance_prompt else None,
        is_streamed=stream,
    )


def check_output(output: Path, pipeline: str) -> None:
    """Raises InputError when the clip could not be written, before anything else is done."""
    from aiprod_pipelines import media

    is_sound = pipeline == "text-to-audio"
    media.check_output_path(output, media.SOUND_SUFFIXES if is_sound else media.VIDEO_SUFFIXES)


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

    from aiprod_pipelines.progress import RichProgress

    started = time.monotonic()
    is_piped = is_streamed and str(output) == "-"
    if not is_piped:
        check_output(output, pipeline.name)
    progress = RichProgress()
    if enhancer is not None:
        from aiprod_pipelines.prompt_enhancer import enhance_request

        request = enhance_request(pipeline.models, request, enhancer, progress)
    clip = pipeline.run(request, progress=progress)
    if is_streamed:
        from aiprod_pipelines.streaming import write_stream

        written = write_stream(clip.stream(), output, started=started)
        extra: dict[str, Any] = {"first_segment_s": round(written.first_segment_s, 3)}
    else:
        clip.save(output)
        extra = {}
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


@pipelines_app.command("list")
@explains_errors
def list_pipelines(as_json: JsonFlag = False) -> None:
    """List the pipelines with what each is for and the inputs that it takes."""
    if as_json:
        entries = [{"name": name, **entry._asdict()} for name, entry in PIPELINES.items()]
        typer.echo(json.dumps(entries))
        return
    rows = [(name, entry.summary, entry.inputs) for name, entry in PIPELINES.items()]
    print_table(("pipeline", "", "inputs"), rows)


@app.command()
@explains_errors
def inspect(
    clip: Annotated[Path, typer.Argument(help="A clip that AIPROD wrote.")],
    as_json: JsonFlag = False,
) -> None:
    """Show the recipe that a clip carries: prompt, seed, model, every setting.

    [dim]aiprod inspect ball.mp4[/dim]
    """
    from aiprod_pipelines import media
    from aiprod_pipelines.recipe import read_recipe

    info = media.probe(clip)
    recipe = read_recipe(clip)
    if as_json:
        typer.echo(json.dumps(recipe, ensure_ascii=False))
        return
    sound = f"{info.audio_codec} at {info.audio_sample_rate} Hz" if info.audio_codec else "none"
    rows = {
        "file": f"{info.width}x{info.height}, {info.num_frames} frames at {info.fps:g} fps",
        "sound": sound,
        "pipeline": recipe["pipeline"],
        "model": recipe["model"]["name"],
        **{f"model file {i}": _identity(f) for i, f in enumerate(recipe["model"]["files"], 1)},
        "text encoder": recipe["text_encoder"]["source"] or "the model's",
        **{name: _as_text(value) for name, value in recipe["request"].items()},
        **{f"sha256 of {name}": digest for name, digest in recipe["inputs"].items()},
        "computed on": ", ".join(recipe["computed_on"].values()),
        "versions": ", ".join(f"{name} {number}" for name, number in recipe["versions"].items()),
        "latents sha256": recipe["latents_sha256"],
    }
    print_table(("", ""), list(rows.items()))


@app.command()
@explains_errors
def replay(
    clip: Annotated[Path, typer.Argument(help="A clip that AIPROD wrote.")],
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only say whether the same latents come out, bit for bit: exit 0, or 1.",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: CLIP-replay.mp4 beside it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model is now, if it has moved.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Where the text encoder is now, if it has moved.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: as the clip was made.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: as the clip was made.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a clip again from the recipe that it carries, or say which input has changed.

    [dim]aiprod replay ball.mp4[/dim]
    [dim]aiprod replay ball.mp4 --check[/dim]
    """
    from aiprod_pipelines.progress import RichProgress
    from aiprod_pipelines.replay import open_replay

    target = output or clip.with_name(f"{clip.stem}-replay{clip.suffix}")
    again = open_replay(clip, model=model, text_encoder=text_encoder, device=device, dtype=dtype)
    if not check:
        check_output(target, again.pipeline.name)
    report: dict[str, Any] = {
        "same": False,
        "changed": again.changed,
        "noted": again.noted,
        "latents_sha256": None,
        "expected_sha256": again.recipe["latents_sha256"],
        "output": None,
    }
    if not (check and again.changed):  # another input cannot give the same latents
        result = again.run(RichProgress())
        report["same"] = again.is_same(result)
        report["latents_sha256"] = result.recipe["latents_sha256"]
        if not check:
            report["output"] = str(result.save(target))
    if as_json:
        typer.echo(json.dumps(report))
    else:
        verdict = "the same latents, bit for bit" if report["same"] else "not the same latents"
        typer.echo(f"{report['output'] or clip}: {verdict}")
        for reason in [] if report["same"] else [*again.changed, *again.noted]:
            typer.echo(f"  {reason}")
    if check and not report["same"]:
        raise typer.Exit(1)


@models_app.command("list")
@explains_errors
def list_models(as_json: JsonFlag = False) -> None:
    """List the models that can be named without a path: shipped ones, and the hub cache's."""
    from aiprod_pipelines.components import available_models

    found = available_models()
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [(m["name"], _size(m["bytes"]) if m["bytes"] else "-", m["note"]) for m in found]
    print_table(("model", "size", ""), rows)


@models_app.command("show")
@explains_errors
def show_model(
    model: Annotated[str, typer.Argument(help="A name or path as for `generate --model`.")],
    as_json: JsonFlag = False,
) -> None:
    """Show a model's version, grid, defaults and parameter counts, from its header alone.

    [dim]aiprod models show nano[/dim]
    """
    from aiprod_pipelines.components import describe_model

    facts = describe_model(model)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    rows = [
        (name, _as_text(value))
        for name, value in facts.items()
        if name not in ("parameters", "defaults") and value is not None
    ]
    rows += [(f"default {name}", _as_text(value)) for name, value in facts["defaults"].items()]
    rows += [(name, f"{count:,} parameters") for name, count in facts["parameters"].items()]
    rows.append(("total", f"{sum(facts['parameters'].values()):,} parameters"))
    print_table(("", ""), rows)


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # hashes stay whole in a pipe
    table = Table(box=box.SIMPLE, show_header=any(header), pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        # Text, not str: a prompt may hold square brackets, which rich would read as markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_as_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_as_text(item) for item in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _identity(file: dict[str, Any]) -> str:
    kind = "sha256" if "sha256" in file else "sampled_sha256"
    return f"{file['file']}, {_size(file['bytes'])}, {kind} {file[kind]}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


if __name__ == "__main__":
    main()
