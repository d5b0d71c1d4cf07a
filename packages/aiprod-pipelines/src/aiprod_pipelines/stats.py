"""What was recorded of runs: read, summed up, and handed to Prometheus and OpenTelemetry.

`aiprod stats` shows it; the lines are those of `analytics`, the page is `stats_page`.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError
from aiprod_pipelines.analytics import Fact, analytics_folder, record_files

DETAILS = ("load", "step", "frames")  # spans that are parts of a stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """A part of a run. `at` is seconds from the run's start; `parent` is None for stages."""

    id: int
    parent: int | None
    name: str
    at: float
    seconds: float
    memory_mib: float
    counts: dict[str, int] = field(default_factory=dict)
    energy_j: float | None = None

    @property
    def end(self) -> float:
        return self.at + self.seconds


@dataclass
class Run:
    """A recorded run. `status` is "done", the class of the error that ended it, or "unfinished"."""

    id: str
    start: float = 0.0  # seconds since the epoch
    command: str = ""
    version: str = ""
    seconds: float = 0.0
    status: str = "unfinished"
    peak_mib: float | None = None
    energy_j: float | None = None
    facts: dict[str, Fact] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)  # in order of their start

    @property
    def counts(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for part in self.spans:
            for name, number in part.counts.items():
                total[name] = total.get(name, 0) + number
        return total

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, in order of first use; those of a stage within another are its own."""
        by_id = {part.id: part for part in self.spans}
        own = {part.id: part.seconds for part in self.spans}
        for part in self.spans:
            if part.parent in own:
                own[part.parent] -= part.seconds
        seconds: dict[str, float] = {}
        for part in self.spans:
            stage = part
            while stage.name in DETAILS and stage.parent in by_id:
                stage = by_id[stage.parent]
            seconds[stage.name] = seconds.get(stage.name, 0.0) + own[part.id]
        return seconds

    @property
    def covered_share(self) -> float:
        """Of the run's wall time, what lies within its named stages."""
        covered, until = 0.0, 0.0
        for part in self.spans:
            if part.parent is None and part.end > until:
                covered += part.end - max(part.at, until)
                until = part.end
        return covered / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the spans."""
        return {
            "run": self.id,
            "start": self.start,
            "command": self.command,
            "version": self.version,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "covered_share": round(self.covered_share, 4),
            "stages": {name: round(seconds, 3) for name, seconds in self.stages.items()},
            "peak_mib": self.peak_mib,
            "energy_j": self.energy_j,
            **self.counts,
            **self.facts,
        }


def read_runs(folder: Path | None = None) -> list[Run]:
    """All runs that are kept, the oldest first. What is not a whole line of ours is passed over."""
    folder = analytics_folder() if folder is None else folder
    runs: dict[str, Run] = {}
    for path in record_files(folder) if folder is not None else ():
        with suppress(FileNotFoundError), path.open("rb") as file:
            for line in file:
                read_line(line, runs)
    for one in runs.values():
        one.spans.sort(key=lambda part: (part.at, part.id))
        if one.status == "unfinished":
            one.seconds = max((part.end for part in one.spans), default=0.0)
    return sorted(runs.values(), key=lambda one: one.start)


def read_line(line: bytes, runs: dict[str, Run]) -> Run | None:
    """Adds what a line says to its run in `runs`, and returns that."""
    try:
        entry = json.loads(line)
        found = runs.setdefault(entry["run"], Run(entry["run"]))
        if "span" in entry:
            found.spans.append(
                Span(
                    entry["span"],
                    entry["parent"],
                    entry["name"],
                    entry["at"],
                    entry["seconds"],
                    entry["memory_mib"],
                    entry.get("counts", {}),
                    _joules(entry),
                )
            )
        elif "facts" in entry:
            found.facts |= entry["facts"]
        elif "end" in entry:
            found.seconds, found.status = entry["end"], entry["status"]
            found.peak_mib, found.energy_j = entry["peak_mib"], _joules(entry)
        else:
            found.start, found.command = entry["start"], entry["command"]
            found.version = entry["version"]
        return found
    except (ValueError, KeyError, TypeError):
        return None


def _joules(entry: dict[str, Any]) -> float | None:
    known = [entry[name] for name in ("cpu_j", "gpu_j") if name in entry]
    return round(sum(known), 3) if known else None


def find_run(runs: list[Run], name: str | None) -> Run:
    """The run whose id begins so, or the last. Raises InputError."""
    if not runs:
        raise InputError("no run is recorded yet; make a clip with aiprod generate.")
    if name is None:
        return runs[-1]
    found = [one for one in runs if one.id.startswith(name)]
    if len(found) != 1:
        raise InputError(
            f"run {name}: {'no such run' if not found else f'{len(found)} runs begin so'}; the "
            f"last is {runs[-1].id}."
        )
    return found[0]


# For other tools.


def export_run(path: Path, offset: int, run_id: str) -> None:
    """Hands OpenTelemetry the run that was recorded in a file from `offset` on."""
    runs: dict[str, Run] = {}
    with suppress(OSError), path.open("rb") as file:
        file.seek(offset)
        for line in file:
            read_line(line, runs)
    if run_id not in runs:
        return
    try:
        export(runs[run_id])
    except ImportError:
        logger.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but nothing is sent without "
            'pip install "aiprod-pipelines[opentelemetry]"'
        )


def export(one: Run) -> None:
    """Hands a run's spans to OpenTelemetry's own exporter, which the OTEL_ variables configure.

    Raises ImportError without the extra `opentelemetry`.
    """
    from opentelemetry import trace

    tracer = tracer_provider().get_tracer("aiprod", one.version)

    def ns(seconds: float) -> int:
        return int((one.start + seconds) * 1e9)

    figures = one.to_dict().items()
    attributes = {f"aiprod.{k}": v for k, v in figures if isinstance(v, str | int | float)}
    root = tracer.start_span(f"aiprod {one.command}", start_time=ns(0), attributes=attributes)
    if one.status != "done":
        root.set_status(trace.StatusCode.ERROR, one.status)
    contexts: dict[int | None, Any] = {None: trace.set_span_in_context(root)}
    opened = []
    for part in sorted(one.spans, key=lambda p: p.id):  # parents have smaller numbers
        made = tracer.start_span(
            part.name,
            contexts.get(part.parent, contexts[None]),
            start_time=ns(part.at),
            attributes={"aiprod.memory_mib": part.memory_mib, **part.counts},
        )
        contexts[part.id] = trace.set_span_in_context(made)
        opened.append((made, part.end))
    for made, end in reversed(opened):
        made.end(ns(end))
    root.end(ns(one.seconds))


@functools.lru_cache(maxsize=1)
def tracer_provider() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "aiprod")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    # In the background; what is left is sent when the process ends.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def write_prometheus(path: Path) -> None:
    """Sums over all runs that are kept, in the text format that node_exporter collects.

    Raises InputError without prometheus_client.
    """
    try:
        from prometheus_client import CollectorRegistry, write_to_textfile
    except ImportError:
        raise InputError(
            'writing for Prometheus needs: pip install "aiprod-pipelines[prometheus]"'
        ) from None
    registry = CollectorRegistry()
    registry.register(RunCollector(from_start=True))  # pyright: ignore[reportArgumentType]
    write_to_textfile(str(path), registry)


class RunCollector:
    """Sums over runs for a registry of prometheus_client, read from the files when it is scraped.

    Counts runs that end after it was made, or with `from_start` all that are kept. Processes write,
    one reads: a server's workers show up in its web process.
    """

    def __init__(self, folder: Path | None = None, *, from_start: bool = False) -> None:
        self.folder = analytics_folder() if folder is None else folder
        self._offsets: dict[Path, int] = {}
        self._open: dict[str, Run] = {}
        self._sums: dict[tuple[str, tuple[str, ...]], float] = {}
        if self.folder is not None and not from_start:
            self._offsets = {path: path.stat().st_size for path in record_files(self.folder)}

    def describe(self) -> Iterator[Any]:
        return iter(())  # nothing is read before the first scrape

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        self._read()
        for name, (text, labels) in COUNTERS.items():
            family = CounterMetricFamily(f"aiprod_{name}", text, labels=labels)
            for (kind, values), total in self._sums.items():
                if kind == name:
                    family.add_metric(values, total)
            yield family

    def _read(self) -> None:
        for path in record_files(self.folder) if self.folder is not None else ():
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the rest of it comes later
                    self._offsets[path] = self._offsets.get(path, 0) + len(line)
                    found = read_line(line, self._open)
                    if found is not None and found.status != "unfinished":
                        self._add(self._open.pop(found.id))

    def _add(self, one: Run) -> None:
        def add(name: str, value: float, *labels: str) -> None:
            self._sums[name, labels] = self._sums.get((name, labels), 0.0) + value

        pipeline = str(one.facts.get("pipeline", "none"))
        add("runs", 1, one.command, pipeline, one.status)
        add("run_seconds", one.seconds, one.command, pipeline)
        for stage, seconds in one.stages.items():
            add("stage_seconds", seconds, stage)
        for name, number in one.counts.items():
            if name in COUNTERS:
                add(name, number)
        if one.energy_j is not None:
            add("energy_joules", one.energy_j)


# What Prometheus is told: name, help, labels.
COUNTERS: dict[str, tuple[str, list[str]]] = {
    "runs": ("Clips that were made or failed.", ["command", "pipeline", "status"]),
    "run_seconds": ("Wall time of runs.", ["command", "pipeline"]),
    "stage_seconds": ("Wall time by stage.", ["stage"]),
    "model_calls": ("Calls of the transformer.", []),
    "cache_hits": ("Prompts and images that were known.", []),
    "cache_misses": ("Prompts and images that had to be encoded.", []),
    "energy_joules": ("Energy that the machine used during runs.", []),
}
