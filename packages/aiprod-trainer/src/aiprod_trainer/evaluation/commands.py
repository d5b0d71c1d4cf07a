"""`aiprod eval` and `aiprod compare`, joined to the command by the entry point `aiprod.commands`.

Nothing heavy is imported before a command runs.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aiprod_pipelines.terminal import explains_errors, print_table

if TYPE_CHECKING:
    from aiprod_pipelines.pipeline import Pipeline
    from aiprod_trainer.evaluation.prompts import Prompt
    from aiprod_trainer.evaluation.scores import Row

app = typer.Typer()

PromptsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="One prompt a line, plain or as JSON with what it states of the world; default: "
        "captions of the world that no training saw.",
    ),
]
NumPromptsOption = Annotated[
    int, typer.Option(help="Captions of the world, half in unseen synonyms; 24 for a quick look.")
]
WorldOption = Annotated[
    str | None,
    typer.Option(help="v1, or v2 with cameras; default: the one that the model was trained on."),
]
SeedOption = Annotated[int, typer.Option(help="Of prompts and clips.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A field of every request, as num_inference_steps=8 or cfg_scale=3. Repeat.",
    ),
]
ClipsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the clips are kept; a run that was stopped goes on there. Default: "
        "outputs/eval/MODEL-PIPELINE-WORLD.",
    ),
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="DIR", help="Write a page with contact sheets.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write figures here.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps.")]


@app.command("eval")
@explains_errors
def evaluate(
    clips: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[CLIP]...", help="Files or folders to measure; no model then."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A name or path as for `generate`.")
    ] = None,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="One from text.")] = "one-stage",
    prompts: PromptsOption = None,
    num_prompts: NumPromptsOption = 200,
    world: WorldOption = None,
    seed: SeedOption = 2026,
    setting: SetOption = None,
    clips_dir: ClipsOption = None,
    distilled: Annotated[
        bool,
        typer.Option(
            "--distilled/--no-distilled",
            help="Ask the model's distilled sibling too, where there is one.",
        ),
    ] = True,
    json_file: JsonFile = None,
    html: HtmlOption = None,
    device: DeviceOption = None,
) -> None:
    """Score a model on prompts, or measure clips.

    [dim]aiprod eval --model nano --json scores.json --html page[/dim]
    [dim]aiprod eval --model nano --num-prompts 24 --set num_inference_steps=8[/dim]
    [dim]aiprod eval clip.mp4 takes/ --html page[/dim]
    """
    from aiprod_core.errors import InputError

    _check_targets(json_file, html)
    if bool(clips) == bool(model):
        raise InputError("give clips to measure, or a --model to make some; one of the two.")
    if clips:
        _measure_files(clips, json_file, html)
        return
    from aiprod_trainer.evaluation.clips import open_pipeline
    from aiprod_trainer.evaluation.scores import CODEC_SCENES, codec_scores, distilled_share

    assert model is not None
    opened = open_pipeline(model, pipeline, device=device)
    world = world or _world_of(opened)
    asked = _prompts(prompts, num_prompts, world, seed)
    settings = _settings(setting or [])
    folder = clips_dir or _default_folder(opened, world)
    rows, scores = _score(opened, asked, folder, seed, settings)
    result: dict[str, Any] = {
        "model": opened.models.name,
        "pipeline": pipeline,
        "world": world,
        "num_prompts": len(asked),
        "seed": seed,
        "settings": settings,
    }
    scenes = [prompt.scene for prompt in asked if prompt.scene is not None]
    if scenes:
        scores = codec_scores(opened.models, scenes[:CODEC_SCENES]) | scores
        student = _distilled_sibling(opened, device) if distilled else None
        if student is not None:
            beside = folder.with_name(f"{folder.name}-distilled")
            _, theirs = _score(student, asked, beside, seed, {"skip_stage_2": True})
            share = distilled_share(scores, theirs)
            scores |= {"distilled_share": share}
            result["distilled"] = {"model": student.models.name, **theirs}
    result = scores | result
    _print_scores(scores)
    _write_json(json_file, result | {"clips": [row.to_dict() for row in rows]})
    if html is not None:
        from aiprod_trainer.evaluation.page import write_page

        title = f"{opened.models.name}, {pipeline}"
        subtitle = f"{len(asked)} prompts of world {world}, seed {seed}"
        if prompts is not None:
            subtitle = f"{len(asked)} prompts of {prompts}, seed {seed}"
        page = write_page(html, rows, title=title, subtitle=subtitle, scores=scores)
        typer.echo(page)


@app.command()
@explains_errors
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="MODEL[,NAME=VALUE...]; see --help.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, for the other side.")],
    prompts: PromptsOption = None,
    num_prompts: NumPromptsOption = 48,
    world: WorldOption = None,
    seed: SeedOption = 2026,
    clips_dir: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the clips are kept, a folder for each side."),
    ] = Path("outputs/compare"),
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    json_file: JsonFile = None,
    device: DeviceOption = None,
) -> None:
    """Compare two models or settings on the same prompts and seeds, with paired intervals.

    A side is a model and what it is asked with; `pipeline` may be one of the names. B - A is given
    with an interval from a paired bootstrap over the prompts.

    [dim]aiprod compare nano nano,cfg_scale=5[/dim]
    [dim]aiprod compare nano nano-distilled,pipeline=distilled --prompts prompts.txt[/dim]
    """
    from aiprod_core.errors import InputError
    from aiprod_trainer.evaluation.clips import open_pipeline
    from aiprod_trainer.evaluation.comparison import compare_rows

    _check_targets(json_file, None)
    if not 0.5 <= confidence < 1:
        raise InputError(f"--confidence is from 0.5 to below 1; got {confidence:g}, try 0.95.")
    opened = []
    for text in (a, b):
        model, *pairs = text.split(",")
        settings = _settings(pairs)
        pipeline = open_pipeline(model, settings.pop("pipeline", "one-stage"), device=device)
        opened.append((pipeline, settings))
    asked = _prompts(prompts, num_prompts, world or _world_of(opened[0][0]), seed)
    sides = [
        _score(pipeline, asked, clips_dir / name, seed, settings)[0]
        for name, (pipeline, settings) in zip("ab", opened, strict=True)
    ]
    found = compare_rows(*sides, confidence=confidence, seed=seed)
    percent = f"{100 * confidence:g} %"
    print_table(
        ("figure", "A", "B", "B - A", percent, "pairs", ""),
        [
            (
                d.name,
                f"{d.a:.4g}",
                f"{d.b:.4g}",
                f"{d.difference:+.4g}",
                f"{d.low:+.4g} to {d.high:+.4g}",
                str(d.pairs),
                "clear" if d.is_clear else "",
            )
            for d in found
        ],
    )
    differences = {d.name: d._asdict() | {"is_clear": d.is_clear} for d in found}
    _write_json(json_file, {"a": a, "b": b, "num_prompts": len(asked), "figures": differences})


def _measure_files(clips: Sequence[Path], json_file: Path | None, html: Path | None) -> None:
    from rich.progress import track

    from aiprod_pipelines.metrics.report import measure_file
    from aiprod_trainer.evaluation.scores import Row

    files = _files(clips)
    rows = [Row(path, "", measure_file(path)) for path in track(files, "clips", transient=True)]
    rows.sort(key=lambda row: -sum(row.report.faults.values()))
    print_table(
        ("clip", "faults", "motion", "smooth", "flicker", "camera", "LUFS", "peak", "A/V offset"),
        [_file_line(row) for row in rows],
    )
    _write_json(json_file, {"clips": [row.to_dict() for row in rows]})
    if html is not None:
        from aiprod_trainer.evaluation.page import write_page

        subtitle = f"{len(rows)} clips, worst fault first"
        typer.echo(write_page(html, rows, title="Clips", subtitle=subtitle, scores={}))


def _file_line(row: "Row") -> tuple[str, ...]:
    figures = row.report.figures

    def show(name: str, form: str, unit: str = "") -> str:
        value = figures.get(name)
        return "-" if value is None else f"{value:{form}}{unit}"

    faults = ", ".join(f"{name} {severity:.2f}" for name, severity in row.report.faults.items())
    return (
        row.file.name,
        faults or "none",
        show("motion_widths_per_s", ".3f", " w/s"),
        show("motion_smoothness", ".2f"),
        show("flicker_levels", ".2f"),
        show("camera", ""),
        show("loudness_lufs", ".1f"),
        show("peak_dbfs", ".1f", " dB"),
        show("av_offset_ms", "+.0f", " ms"),
    )


def _files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and of folders every clip in them."""
    from aiprod_core.errors import InputError

    suffixes = (".mp4", ".mov", ".mkv", ".webm", ".wav", ".flac", ".m4a")
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            if not inside:
                raise InputError(f"{path}: no clip ({', '.join(suffixes)}) in this folder.")
            found += inside
        else:
            found.append(path)
    return found


def _prompts(file: Path | None, count: int, world: str, seed: int) -> "list[Prompt]":
    from aiprod_core.errors import InputError
    from aiprod_trainer.evaluation.prompts import read_prompts, world_prompts

    if file is not None:
        return read_prompts(file, world)
    if count < 1:
        raise InputError(f"--num-prompts is at least 1; got {count}.")
    return world_prompts(count, world, seed)


def _score(
    pipeline: "Pipeline", asked: "list[Prompt]", folder: Path, seed: int, settings: dict[str, Any]
) -> "tuple[list[Row], dict[str, Any]]":
    """Makes what clips are missing, judges all, and sums up."""
    from rich.console import Console
    from rich.progress import track

    from aiprod_trainer.evaluation.clips import make_clips
    from aiprod_trainer.evaluation.scores import judge_clip, score_rows

    paths = make_clips(pipeline, asked, folder, seed=seed, settings=settings)
    pairs = list(zip(paths, asked, strict=True))
    console = Console(stderr=True)
    rows = [judge_clip(*pair) for pair in track(pairs, "judging", console=console)]
    return rows, score_rows(rows) if any(row.verdict for row in rows) else {}


def _world_of(pipeline: "Pipeline") -> str:
    """What the checkpoint's metadata names, or v1."""
    return str(pipeline.models.checkpoint.metadata.get("world", "v1"))


def _distilled_sibling(pipeline: "Pipeline", device: str | None) -> "Pipeline | None":
    """The distilled pipeline of the same model; None where it is distilled itself, or there is
    none beside it."""
    from aiprod_core.errors import InputError
    from aiprod_pipelines import companions
    from aiprod_trainer.evaluation.clips import open_pipeline

    if pipeline.models.is_distilled or pipeline.is_distilled:
        return None
    beside = companions.find_beside(pipeline.models.checkpoint, "distilled")
    if beside is None:
        return None
    is_lora = "lora" in beside.name
    try:
        return open_pipeline(
            pipeline.models.name if is_lora else str(beside), "distilled", device=device
        )
    except InputError:
        return None


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; numbers, true, false and JSON are read as such, the rest as text."""
    from aiprod_core.errors import InputError

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise InputError(f"{pair!r}: give NAME=VALUE, such as num_inference_steps=8.")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = value
    return settings


def _default_folder(pipeline: "Pipeline", world: str) -> Path:
    name = pipeline.models.name.removesuffix(".safetensors").strip("/").replace("/", "_")
    return Path("outputs/eval") / f"{name}-{pipeline.name}-{world}"


def _check_targets(json_file: Path | None, html: Path | None) -> None:
    """Raises InputError where the results could not be written, before an hour of clips."""
    from aiprod_core.errors import InputError

    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"{json_file}: cannot be written; give a file in a folder that exists.")
    if html is not None and html.exists() and not html.is_dir():
        raise InputError(f"{html}: a file; --html takes a folder.")


def _print_scores(scores: dict[str, Any]) -> None:
    from aiprod_trainer.evaluation.scores import GOALS, is_reached

    rows = []
    for name, value in scores.items():
        if name.endswith(("_n", "_due")):
            continue
        low, high = GOALS.get(name, (None, None))
        goal = f">= {low:g}" if low is not None else f"<= {high:g}" if high is not None else ""
        mark = {True: "reached", False: "missed", None: ""}[is_reached(name, value)]
        count = scores.get(f"{name}_n")
        rows.append((name, "-" if value is None else f"{value:g}", str(count or ""), goal, mark))
    print_table(("figure", "value", "clips", "goal", ""), rows)


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Under a temporary name first."""
    if path is None:
        return
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
