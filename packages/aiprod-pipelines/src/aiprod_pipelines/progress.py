"""Stages of a run: timed, and shown by whoever wants to watch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiprod_pipelines import analytics

Advance = Callable[[int], None]


class Progress:
    """Times named stages in `seconds`; a name that comes back adds up. Subclasses show them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Advance]:
        """Runs a stage of `total` parts; the block calls what it is given with parts done."""
        started = time.monotonic()
        try:
            with analytics.span(name), self.show(name, total) as advance:
                yield advance
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        yield lambda done: None

    def note(self, text: str) -> None:
        """Something worth knowing that stops nothing."""

    def preview(self, latents: Callable[[], Any]) -> None:
        """Offers the clip as it is estimated after a step, as `latents()`: an AV of latents."""


class RichProgress(Progress):
    """One bar a stage on standard error, or one line a stage where that is not a terminal."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        from rich import progress

        if not self.console.is_terminal:
            started = time.monotonic()
            yield lambda done: None
            self.console.print(f"{name}: {time.monotonic() - started:.1f} s", soft_wrap=True)
            return
        columns = (
            progress.TextColumn("{task.description:<16}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(compact=True),
        )
        with progress.Progress(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total)
            yield lambda done: bars.advance(task, done)
            bars.update(task, completed=total)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)
