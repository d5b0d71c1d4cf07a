"""The `aiprod` command: parse, build a request, call what Python calls, write the file.

torch and the pipelines are imported inside the commands, so that help is there at once.
Exit codes: 0 done, 2 something the user can mend (one sentence on standard error), 130 interrupted,
1 anything else. Other packages add command groups through the entry point group `aiprod.commands`.
"""

import functools
import json
import signal
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

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
        app.add_typer(entry.load(), name=entry.name)
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
    seed: Annotated[int, typer.Option(help="The same seed gives the same clip.")] = 10,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:FRAME[:STRENGTH]]",
            help="An image that the clip shows at a frame (default 0, the first), kept exactly at "
            "strength 1 (default). Repeat for more.",
        ),
    ] = None,
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
    no_audio: Annotated[bool, typer.Option("--no-audio", help="Make a silent clip.")] = False,
    enlarge: Annotated[
        int, typer.Option(help="Whole factor by which the picture is enlarged for viewing.")
    ] = 1,
    enlarge_method: Annotated[
        str, typer.Option(help="bicubic, lanczos, or nearest (shows the model's own pixels).")
    ] = "bicubic",
    crf: Annotated[int, typer.Option(help="H.264 quality, 0 (lossless) to 51 (worst).")] = 19,
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
    from aiprod_pipelines import media
    from aiprod_pipelines.progress import RichProgress
    from aiprod_pipelines.request import GenerationRequest, ImageCondition, PerModality

    media.check_output_path(output)
    scales: dict[str, Any] = {
        name: PerModality.parse(text, f"--{name.replace('_', '-')}")
        for name, text in (
            ("cfg_scale", cfg_scale),
            ("stg_scale", stg_scale),
            ("modality_scale", modality_scale),
            ("rescale_scale", rescale_scale),
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
        generate_audio=not no_audio,
        enlarge=enlarge,
        enlarge_method=enlarge_method,
        crf=crf,
        **scales,
    )
    from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

    progress = RichProgress()
    pipeline = TI2VidOneStagePipeline.from_model(
        model, text_encoder=text_encoder, device=device, dtype=dtype
    )
    clip = pipeline.run(request, progress=progress)
    clip.save(output)
    report = clip.report(output)
    if as_json:
        typer.echo(json.dumps(report))
        return
    sound = f", {report['audio_sample_rate']} Hz sound" if report["audio_sample_rate"] else ""
    typer.echo(
        f"{output}: {report['width']}x{report['height']}, {report['num_frames']} frames at "
        f"{report['frame_rate']:g} fps{sound}, seed {seed}, "
        f"{sum(report['seconds'].values()):.1f} s"
    )


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
        **{name: _as_text(value) for name, value in recipe["request"].items()},
        "computed on": ", ".join(recipe["computed_on"].values()),
        "versions": ", ".join(f"{name} {number}" for name, number in recipe["versions"].items()),
        "latents sha256": recipe["latents_sha256"],
    }
    _print_table(("", ""), list(rows.items()))


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
    _print_table(("model", "size", ""), rows)


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
    _print_table(("", ""), rows)


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
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
    kind = "sha256" if "sha256" in file else "header_sha256"
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
