"""Commands around `aiprod generate`: presets, what is kept between runs, many prompts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aiprod_pipelines.cli import JsonFlag, ModelOption, explains_errors, print_table, size_text

app = typer.Typer()
cache_app = typer.Typer(help="What is kept between runs.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
presets_app = typer.Typer(help="Settings under one name.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")


@cache_app.command("info")
@explains_errors
def cache_info(as_json: JsonFlag = False) -> None:
    """Show where embedded prompts and encoded images are kept, and how much they take."""
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
