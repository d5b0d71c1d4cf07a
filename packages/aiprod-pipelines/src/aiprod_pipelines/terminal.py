"""What all commands of `aiprod` share: options, errors turned into sentences, tables."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

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


def explains_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what a user can mend into one sentence and exit code 2, and Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from aiprod_core.errors import InputError, is_out_of_memory

        try:
            command(*args, **kwargs)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: nothing was written", err=True)
            raise typer.Exit(130) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            typer.echo(
                "error: out of memory; try fewer frames (--num-frames) or a smaller picture "
                f"(--width, --height). {error}".splitlines()[0],
                err=True,
            )
            raise typer.Exit(1) from None

    return wrapped


def check_output(output: Path, pipeline: str) -> None:
    """Raises InputError when the clip could not be written, before anything else is done."""
    from aiprod_pipelines import media

    is_sound = pipeline == "text-to-audio"
    media.check_output_path(output, media.SOUND_SUFFIXES if is_sound else media.VIDEO_SUFFIXES)


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


def as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item) for item in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def size_text(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"
