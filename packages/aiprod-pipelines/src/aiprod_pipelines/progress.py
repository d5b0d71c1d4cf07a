"""Stages of a run: timed, and shown by whoever wants to watch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiprod_pipelines import analytics

Advance = Callable[[int], None]


class Progress:
    """Times named stages in `seconds`; a name that comes back adds up. Subclasses show them.

    The time of a stage is without that of stages within it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = 0.0  # seconds of stages within the one that runs

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Advance]:
        """Runs a stage of `total` parts; the block calls what it is given with parts done."""
        started, outer = time.monotonic(), self._within
        self._within = 0.0
        try:
            with analytics.span(name), self.show(name, total) as advance:
                yield advance
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._within
            self._within = outer + spent

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
        self._bars: Any = None  # of the outermost stage, which show those within it too

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        from rich import progress

        if not self.console.is_terminal:
            started = time.monotonic()
            yield lambda done: None
            self.console.print(f"{name}: {time.monotonic() - started:.1f} s", soft_wrap=True)
            return
        if self._bars is not None:
            task = self._bars.add_task(name, total=total)
            yield lambda done: self._bars.advance(task, done)
            self._bars.remove_task(task)
            return
        columns = (
            progress.TextColumn("{task.description:<16}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(compact=True),
        )
        with progress.Progress(*columns, console=self.console) as bars:
            self._bars, task = bars, bars.add_task(name, total=total)
            try:
                yield lambda done: bars.advance(task, done)
            finally:
                self._bars = None
            if bars.tasks[task].completed == 0:  # a stage that does not say how far it is
                bars.update(task, completed=total)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)
