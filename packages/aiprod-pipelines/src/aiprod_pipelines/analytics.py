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
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Fact = str | int | float | bool | None

FILE_BYTES = 2**22  # a file that is longer is followed by another
FILES_KEPT = 8
OTEL_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
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
        if any(os.environ.get(name) for name in OTEL_ENDPOINTS):
            from aiprod_pipelines.stats import export_run

            export_run(opened.path, opened.offset, opened.id)


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
    files = record_files(folder)
    if not files or files[-1].stat().st_size >= FILE_BYTES:
        files.append(folder / f"spans-{time.time_ns() // 1_000_000:015}.jsonl")
    for old in files[:-FILES_KEPT]:
        old.unlink(missing_ok=True)
    return files[-1]


def record_files(folder: Path) -> list[Path]:
    """Oldest first."""
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
