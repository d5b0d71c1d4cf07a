"""Where a run's seconds, memory and energy went: spans, appended as JSON lines on this machine.

    with analytics.run("generate"):
        with analytics.span("denoise"):
            analytics.count("model_calls")

A run is one clip made: by the command line, from Python or by a server's worker. Outside of one,
`span` and `count` do nothing. Lines are appended whole and at once, so a crash cuts the last one at
worst, and the run it ends is read as unfinished. Files are small and the oldest go first.

What is written is numbers and names out of the code (stage, pipeline, model, sampler): no prompt,
no path and no message of an error. Nothing leaves the machine unless OpenTelemetry's standard
variable OTEL_EXPORTER_OTLP_ENDPOINT says where to; then a run's spans go there when it ends.

    AIPROD_ANALYTICS    where; default: `analytics` in the user's data directory. "off" writes and
                        exports nothing.
"""

import functools
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from aiprod_core.errors import InputError

T = TypeVar("T")
Fact = str | int | float | bool | None

FILE_BYTES = 2**22  # a file that is longer is followed by another
FILES_KEPT = 8
OTEL_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
DETAILS = ("load", "step", "frames")  # spans that are parts of a stage
LOADED = time.monotonic()

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------- recording


class _Run:
    """A run that is being recorded: the file it is appended to, and what it came to so far."""

    def __init__(self, folder: Path, command: str, began: float) -> None:
        self.id = secrets.token_hex(6)
        self.began = began  # by time.monotonic
        self.path = _file_for_append(folder)
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.offset = os.fstat(self.file).st_size
        self.next_span = 1
        self.energy = _energy_j()
        # A line that a crash has cut is ended first.
        os.write(self.file, b"\n")
        wall = time.time() - (time.monotonic() - began)
        aiprod = version("aiprod-pipelines")
        self.write({"start": round(wall, 6), "command": command, "version": aiprod})

    def write(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"run": self.id, **entry}) + "\n"
        with suppress(OSError):  # a full disk stops no clip
            os.write(self.file, line.encode())

    def end(self, status: str) -> None:
        seconds = time.monotonic() - self.began
        entry = {"end": round(seconds, 6), "status": status, "peak_mib": _peak_mib()}
        self.write(entry | _spent(self.energy))
        os.close(self.file)


class _Span:
    """A span that is open. `counts` are its own, without those of the spans within it."""

    __slots__ = ("began", "counts", "energy", "has_ended", "id", "name", "parent", "run")

    def __init__(self, run: _Run, parent: "_Span | None", name: str, began: float) -> None:
        self.run, self.parent, self.name, self.began = run, parent, name, began
        self.id, run.next_span = run.next_span, run.next_span + 1
        self.counts: dict[str, int] = {}
        # Counters are read at the stages alone: they cost more than a step's line.
        self.energy = _energy_j() if parent is not None and parent.parent is None else None
        self.has_ended = False

    def end(self) -> None:
        self.has_ended = True
        if self.parent is None:
            return  # the run itself
        entry: dict[str, Any] = {
            "span": self.id,
            "parent": self.parent.id if self.parent.parent is not None else None,
            "name": self.name,
            "at": round(self.began - self.run.began, 6),
            "seconds": round(time.monotonic() - self.began, 6),
            "memory_mib": _memory_mib(),
        }
        if self.counts:
            entry["counts"] = self.counts
        self.run.write(entry | _spent(self.energy))


_current: ContextVar[_Span | None] = ContextVar("span", default=None)


@contextmanager
def run(command: str, *, since_start: bool = False) -> Iterator[None]:
    """Records what happens within as one run; inside another run, as a span of it.

    `since_start` counts from the start of the process, with what came before as the span "start".
    """
    folder = analytics_folder()
    if _current.get() is not None:
        with span(command):
            yield
        return
    if folder is None:
        yield
        return
    now = time.monotonic()
    began = now - _process_age_s() if since_start else now
    try:
        opened = _Run(folder, command, began)
    except OSError as error:  # such as a read-only home: a clip is made all the same
        logger.warning("no analytics: %s", error.strerror)
        yield
        return
    root = _Span(opened, None, command, began)
    token = _current.set(root)
    if since_start:
        _Span(opened, root, "start", began).end()
    status = "done"
    try:
        yield
    except BaseException as error:
        status = type(error).__name__
        raise
    finally:
        root.has_ended = True
        with suppress(ValueError):  # a generator that is closed in another context than it began in
            _current.reset(token)
        opened.end(status)
        _export_if_asked(opened)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Records what happens within under a name."""
    parent = _current.get()
    if parent is None:
        yield
        return
    opened = _Span(parent.run, parent, name, time.monotonic())
    _current.set(opened)
    try:
        yield
    finally:
        opened.end()
        # Generators may end before what began within them: go back to what is still open.
        current = _current.get()
        while current is not None and current.has_ended:
            current = current.parent
        _current.set(current)


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items, each one's making recorded as a span and not what is done with it."""
    iterator = iter(items)
    while True:
        with span(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def laps(name: str) -> Callable[[], None]:
    """A function that records a span from its last call, or from now, to its call.

    Counts of the enclosing span since then are the lap's.
    """
    parent = _current.get()
    if parent is None:
        return lambda: None
    last = [time.monotonic()]

    def lap() -> None:
        now = time.monotonic()
        done = _Span(parent.run, parent, name, last[0])
        done.counts, parent.counts = parent.counts, {}
        done.end()
        last[0] = now

    return lap


def count(name: str, number: int = 1) -> None:
    """Adds to a count of the innermost span: model_calls, cache_hits, cache_misses."""
    current = _current.get()
    if current is not None:
        current.counts[name] = current.counts.get(name, 0) + number


def note(**facts: Fact) -> None:
    """Facts of the run: numbers and names out of the code, never what a user wrote."""
    current = _current.get()
    if current is not None:
        current.run.write({"facts": facts})


def analytics_folder() -> Path | None:
    """Where runs are recorded, or None where that is off."""
    place = os.environ.get("AIPROD_ANALYTICS")
    if place == "off":
        return None
    if place:
        return Path(place)
    import platformdirs

    return platformdirs.user_data_path("aiprod") / "analytics"


def _file_for_append(folder: Path) -> Path:
    """The newest file, or the next where that one is full; then the oldest are dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    files = _files(folder)
    if not files or files[-1].stat().st_size >= FILE_BYTES:
        files.append(folder / f"spans-{time.time_ns() // 1_000_000:015}.jsonl")
    for old in files[:-FILES_KEPT]:
        old.unlink(missing_ok=True)
    return files[-1]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("spans-*.jsonl"))


# --------------------------------------------------------------------------------------- counters


def _process_age_s() -> float:
    """Seconds since the process started; where that cannot be told, since this was imported."""
    with suppress(OSError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # starttime, field 22 of proc(5), after the command's two
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - LOADED


def _cuda() -> Any:
    """torch.cuda where a run has begun to use it; it is never imported or started for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _memory_mib() -> float:
    """Held now: by PyTorch on the GPU where one is used, else by the process."""
    cuda = _cuda()
    if cuda is not None:
        return round(cuda.memory_allocated() / 2**20, 1)
    return round(_process().memory_info().rss / 2**20, 1)


def _peak_mib() -> float:
    """The most that was held since the process started, likewise."""
    cuda = _cuda()
    if cuda is not None:
        return round(cuda.max_memory_allocated() / 2**20, 1)
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 2**10, 1)
    return _memory_mib()


@functools.lru_cache(maxsize=1)
def _process() -> Any:
    import psutil

    return psutil.Process()


def _energy_j() -> dict[str, float] | None:
    """Joules that the CPU packages (RAPL) and NVIDIA GPUs have counted; all programs' together."""
    counted = {}
    with suppress(OSError, ValueError):
        packages = [int(path.read_text()) for path in _rapl_counters()]
        if packages:
            counted["cpu_j"] = sum(packages) / 1e6
    gpus = [gpu() for gpu in _gpu_counters()]
    if gpus:
        counted["gpu_j"] = sum(gpus) / 1e3
    return counted or None


@functools.lru_cache(maxsize=1)
def _rapl_counters() -> tuple[Path, ...]:
    """Of whole packages; many systems show them to root alone."""
    found = sorted(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))
    return tuple(path for path in found if os.access(path, os.R_OK))


@functools.lru_cache(maxsize=1)
def _gpu_counters() -> tuple[Callable[[], int], ...]:
    """Millijoules of each GPU since the driver was loaded (Volta and later)."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = [functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, h) for h in handles]
        for gpu in found:
            gpu()
    except pynvml.NVMLError:
        return ()
    return tuple(found)


def _spent(before: dict[str, float] | None) -> dict[str, float]:
    after = _energy_j() if before is not None else None
    if before is None or after is None:
        return {}
    # A counter that started anew in between says nothing.
    return {k: round(after[k] - v, 3) for k, v in before.items() if after.get(k, 0) >= v}


# ---------------------------------------------------------------------------------------- reading


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
    for path in _files(folder) if folder is not None else ():
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


# -------------------------------------------------------------------------------------- exporting


def _export_if_asked(ended: _Run) -> None:
    if not any(os.environ.get(name) for name in OTEL_ENDPOINTS):
        return
    runs: dict[str, Run] = {}
    with suppress(OSError), ended.path.open("rb") as file:
        file.seek(ended.offset)
        for line in file:
            read_line(line, runs)
    if ended.id not in runs:
        return
    try:
        export(runs[ended.id])
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

    tracer = _tracer_provider().get_tracer("aiprod", one.version)

    def ns(seconds: float) -> int:
        return int((one.start + seconds) * 1e9)

    figures = one.to_dict().items()
    attributes = {f"aiprod.{k}": v for k, v in figures if isinstance(v, str | int | float)}
    root = tracer.start_span(f"aiprod {one.command}", start_time=ns(0), attributes=attributes)
    if one.status != "done":
        root.set_status(trace.StatusCode.ERROR, one.status)
    contexts = {None: trace.set_span_in_context(root)}
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
def _tracer_provider() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "aiprod")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    # In the background; what is left is sent when the process ends.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


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
            self._offsets = {path: path.stat().st_size for path in _files(self.folder)}

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
        for path in _files(self.folder) if self.folder is not None else ():
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
