"""Commands around `aiprod generate`: clips' recipes, models, presets, the cache, many prompts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aiprod_pipelines import analytics
from aiprod_pipelines.catalog import PIPELINES
from aiprod_pipelines.terminal import (
    JsonFlag,
    ModelOption,
    as_text,
    check_output,
    explains_errors,
    print_table,
    size_text,
)

app = typer.Typer()
models_app = typer.Typer(help="What models are here, and what is in them.", no_args_is_help=True)
app.add_typer(models_app, name="models")
pipelines_app = typer.Typer(help="The ways to make a clip.", no_args_is_help=True)
app.add_typer(pipelines_app, name="pipelines")
cache_app = typer.Typer(
    help="What is kept between runs: prompts, images, merged adapters, compiled code.",
    no_args_is_help=True,
)
app.add_typer(cache_app, name="cache")
presets_app = typer.Typer(help="Settings under one name.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")


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
        **{name: as_text(value) for name, value in recipe["request"].items()},
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
    with analytics.run("replay", since_start=True):
        with analytics.span("open model"):
            again = open_replay(
                clip, model=model, text_encoder=text_encoder, device=device, dtype=dtype
            )
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
    from aiprod_pipelines.model_files import available_models

    found = available_models()
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        (
            m["name"],
            size_text(m["bytes"]) if m["bytes"] else "-",
            f"{m['parameters']:,}" if m["parameters"] else "-",
            m["note"],
        )
        for m in found
    ]
    print_table(("model", "size", "parameters", ""), rows)


@models_app.command("show")
@explains_errors
def show_model(
    model: Annotated[str, typer.Argument(help="A name or path as for `generate --model`.")],
    as_json: JsonFlag = False,
) -> None:
    """Show a model's version, grid, defaults, parameter counts and scores, from its header alone.

    [dim]aiprod models show nano[/dim]
    """
    from aiprod_pipelines.model_files import describe_model

    facts = describe_model(model)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    rows = [
        (name, as_text(value))
        for name, value in facts.items()
        if name not in ("parameters", "defaults", "scores") and value is not None
    ]
    rows += [(f"score: {name}", as_text(value)) for name, value in facts["scores"].items()]
    rows += [(f"default {name}", as_text(value)) for name, value in facts["defaults"].items()]
    rows += [(name, f"{count:,} parameters") for name, count in facts["parameters"].items()]
    rows.append(("total", f"{sum(facts['parameters'].values()):,} parameters"))
    print_table(("", ""), rows)


@models_app.command("convert")
@explains_errors
def convert_model(
    model: Annotated[str, typer.Argument(help="A name or path as for `generate --model`.")],
    folder: Annotated[Path, typer.Argument(help="Where the files are written.")],
    variant: Annotated[
        list[str] | None,
        typer.Option(help="dev, dev-fp8, distilled or distilled-fp8. Repeat; default: dev-fp8."),
    ] = None,
    distilled_lora: Annotated[
        str | None,
        typer.Option(
            metavar="PATH[:STRENGTH]", help="What makes it distilled; default: beside the model."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:STRENGTH]", help="An adapter to add to all. Repeat."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a model's other variants: adapters in the weights, large weights in fp8.

    [dim]aiprod models convert ltx-2-19b-dev.safetensors models --variant distilled-fp8[/dim]
    """
    from aiprod_pipelines.conversion import convert_variants
    from aiprod_pipelines.request import LoraFile

    written = convert_variants(
        model,
        folder,
        variant or ["dev-fp8"],
        distilled_lora=LoraFile.parse(distilled_lora) if distilled_lora else None,
        loras=[LoraFile.parse(text) for text in lora or ()],
    )
    if as_json:
        typer.echo(json.dumps([str(path) for path in written]))
        return
    for path in written:
        typer.echo(f"{path}: {size_text(path.stat().st_size)}")


def _identity(file: dict[str, Any]) -> str:
    kind = "sha256" if "sha256" in file else "sampled_sha256"
    return f"{file['file']}, {size_text(file['bytes'])}, {kind} {file[kind]}"


@cache_app.command("info")
@explains_errors
def cache_info(as_json: JsonFlag = False) -> None:
    """Show where prompts, images, merged adapters and compiled code are kept, and their size."""
    from aiprod_pipelines.cache import open_cache

    cache = open_cache()
    info = cache.info() if cache else None
    if as_json:
        typer.echo(json.dumps(info))
        return
    if info is None:
        typer.echo("off: AIPROD_CACHE_DIR says so")
        return
    rows = [
        (kind, f"{found['entries']} entries, {size_text(found['bytes'])}")
        for kind, found in info["kinds"].items()
    ]
    limit = f"{size_text(info['bytes'])} of {size_text(info['max_bytes'])}"
    print_table(("", ""), [("folder", info["folder"]), *rows, ("together", limit)])


@cache_app.command("clear")
@explains_errors
def cache_clear(as_json: JsonFlag = False) -> None:
    """Remove all that is kept. The next clips are the same, and compute it anew."""
    from aiprod_pipelines.cache import open_cache

    cache = open_cache()
    removed = cache.clear() if cache else 0
    typer.echo(json.dumps({"removed": removed}) if as_json else f"{removed} entries removed")


@presets_app.command("list")
@explains_errors
def list_presets(as_json: JsonFlag = False) -> None:
    """List the presets and what each is for."""
    from aiprod_pipelines.presets import PRESETS, way_text

    if as_json:
        typer.echo(json.dumps([{"name": name, **p._asdict()} for name, p in PRESETS.items()]))
        return
    rows = [
        (name, preset.summary, way_text({**preset.options, **preset.ways[0]}))
        for name, preset in PRESETS.items()
    ]
    print_table(("preset", "", "at best"), rows)


@presets_app.command("explain")
@explains_errors
def explain_preset(
    name: Annotated[str, typer.Argument(help="A preset; `aiprod presets list` shows them.")],
    model: ModelOption = "nano",
    as_json: JsonFlag = False,
) -> None:
    """Show what a preset means for a model on this machine, and why better ways were not taken.

    [dim]aiprod presets explain draft -m ltx-2-19b-dev.safetensors[/dim]
    """
    from aiprod_pipelines.presets import plan_here, resolve_preset, way_text

    resolved = resolve_preset(name, model)
    plan = plan_here(resolved, model)
    if as_json:
        passed = [{"way": way, "reason": reason} for way, reason in resolved.passed_over]
        report = {"name": name, "model": model, "options": resolved.options, "passed_over": passed}
        typer.echo(json.dumps(report | {"plan": plan.to_dict()}))
        return
    here = f"offload {plan.offload}, peak {size_text(plan.peak_bytes)}"
    fit = "fits" if plan.fits else "does not fit"
    rows = [("is", way_text(resolved.options)), ("here", f"{here}, which {fit}")]
    rows += [(f"not {way}", reason) for way, reason in resolved.passed_over]
    print_table(("", ""), rows)


@app.command()
@explains_errors
def batch(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="JSONL: on each line a prompt, or an object of request fields and `output`."
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Where clips and manifest.jsonl go.")
    ] = Path("clips"),
    model: ModelOption = "nano",
    pipeline: Annotated[
        str, typer.Option("--pipeline", "-p", help="As for generate.")
    ] = "one-stage",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS | local",
            help="Make them on a Ray cluster, or on workers of this machine; default: one by one.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="With --ray: how many; default: one a CPU core or GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    quantization: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    offload: Annotated[str, typer.Option(help="As for generate, but not auto.")] = "none",
    as_json: JsonFlag = False,
) -> None:
    """Make a clip from every line of a file; started again, it makes what is missing.

    [dim]aiprod batch prompts.jsonl -o clips[/dim]
    [dim]aiprod batch prompts.jsonl -o /shared/clips --ray ray://head:10001[/dim]
    """
    from aiprod_pipelines.batch import (
        made_here,
        one_after_the_other,
        over_ray,
        read_jobs,
        run_batch,
    )

    options = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "quantization": quantization,
        "offload": offload,
    }
    suffix = ".wav" if pipeline == "text-to-audio" else ".mp4"
    jobs = read_jobs(prompts, {**options, "pipeline": pipeline}, suffix)
    folder = folder.absolute()
    if ray is None:
        make_all = one_after_the_other(made_here(pipeline, options, folder))
    else:
        make_all = over_ray(ray, pipeline, options, folder, workers=workers)

    def tell(entry: dict[str, Any]) -> None:
        if not as_json:
            typer.echo(f"{entry['output']}: {entry.get('error', entry['status'])}")

    entries = run_batch(jobs, folder, make_all, tell)
    failed = [entry for entry in entries if entry["status"] != "done"]
    if as_json:
        report = {"done": len(entries) - len(failed), "failed": failed, "folder": str(folder)}
        typer.echo(json.dumps(report))
    else:
        typer.echo(f"{folder}: {len(entries) - len(failed)} clips, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


@app.command()
@explains_errors
def stats(
    run: Annotated[
        str | None, typer.Argument(help="The run to look into, by the first digits of its id.")
    ] = None,
    last: Annotated[int, typer.Option(help="How many runs are listed.", min=1)] = 10,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page: the timeline of a run (default: the last), and trends."),
    ] = None,
    prometheus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.prom", help="Write sums over all runs for node_exporter's textfiles."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show where time, memory and energy went in the runs that were recorded here.

    [dim]aiprod stats[/dim]
    [dim]aiprod stats 3fa9 --html runs.html[/dim]
    """
    from aiprod_pipelines.analytics import analytics_folder
    from aiprod_pipelines.stats import find_run, read_runs, write_prometheus
    from aiprod_pipelines.stats_page import about, run_row, write_page

    runs = read_runs()
    written: list[Path] = []
    if html is not None:
        write_page(html, runs, find_run(runs, run))
        written.append(html)
    if prometheus is not None:
        write_prometheus(prometheus)
        written.append(prometheus)
    if as_json:
        listed = [find_run(runs, run)] if run is not None else runs[-last:]
        folder = analytics_folder()
        report = {"folder": None if folder is None else str(folder), "num_runs": len(runs)}
        typer.echo(json.dumps(report | {"runs": [one.to_dict() for one in listed]}))
        return
    if written:
        typer.echo("\n".join(str(path) for path in written))
        return
    if run is not None:
        chosen = find_run(runs, run)
        typer.echo(about(chosen))
        rows = [
            (name, f"{seconds:.3f} s", f"{seconds / chosen.seconds:.1%}" if chosen.seconds else "-")
            for name, seconds in chosen.stages.items()
        ]
        print_table(("stage", "time", "share"), rows)
        return
    find_run(runs, None)  # says so where there is none
    columns = ("id", "started", "what", "model", "size", "seconds", "calls", "peak", "energy",
               "status")  # fmt: skip
    table = [tuple(run_row(one)[name] for name in columns) for one in runs[-last:]]
    print_table(("run", *columns[1:]), table)
