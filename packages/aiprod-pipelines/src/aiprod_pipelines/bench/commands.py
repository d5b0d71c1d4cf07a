"""`aiprod bench`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aiprod_pipelines.terminal import explains_errors, print_table

app = typer.Typer()


@app.command()
@explains_errors
def bench(
    suite: Annotated[
        str, typer.Option(help="cpu, or cuda: 19B at random in bfloat16 and FP8.")
    ] = "cpu",
    cuda: Annotated[bool, typer.Option("--cuda", help="The same as --suite cuda.")] = False,
    output: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every run as JSON.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A case by its name instead of all. Repeat.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Paired runs of each case.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the processor; default: PyTorch's choice.")
    ] = None,
    clock: Annotated[
        str,
        typer.Option(help="wall, or cpu: processor time, for a machine that others use too."),
    ] = "wall",
) -> None:
    """Time AIPROD beside diffusers on the same weights, outputs checked equal first."""
    from aiprod_core.errors import InputError
    from aiprod_pipelines.bench import suites

    if clock not in ("wall", "cpu"):
        raise InputError(f"--clock must be wall or cpu; got {clock}.")
    if suite not in ("cpu", "cuda"):
        raise InputError(f"--suite must be cpu or cuda; got {suite}.")
    settings = suites.Settings(turns=turns, threads=threads, clock=clock)
    run = suites.run_cuda if cuda or suite == "cuda" else suites.run_cpu

    def save(report: dict[str, Any]) -> None:
        if output is not None:
            temporary = output.with_name(output.name + ".tmp")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            temporary.replace(output)

    report = run(settings, only or None, lambda line: typer.echo(line, err=True), save)
    rows = [(name, f"{ratio:.2f}x") for name, ratio in report["ratios"].items()]
    print_table(("", ""), rows)
