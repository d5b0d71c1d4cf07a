"""Runs a function over many tasks: here, in worker processes, or on a Ray cluster.

Tasks and results are JSON objects, and the function is one that can be imported, so that all three
ways do the same. Results come as they are ready, each with its task's number.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from aiprod_core.errors import InputError

Task = dict[str, Any]
Function = Callable[[Task], Any]

# A pool hands out a few more tasks than it has processes, to keep them busy.
PREFETCHED = 2


@dataclass(frozen=True)
class Workers:
    """Where to run: `count` processes here, or the Ray cluster at `ray` ("local" starts one)."""

    count: int = 1
    ray: str | None = None
    gpus_each: int = 0  # what a Ray task asks for

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"workers must be at least 1; got {self.count}.")


def run_tasks(
    function: Function, tasks: Sequence[Task], workers: Workers, *, isolated: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yields (number, result) of every task, in any order. What the function raises is raised.

    The result is None where the task killed its process, which a damaged file can do to a decoder.
    One worker runs here unless `isolated`.
    """
    if not tasks:
        return
    if workers.ray is not None:
        yield from _on_ray(function, tasks, workers)
    elif workers.count > 1 or isolated:
        yield from _in_processes(function, tasks, workers.count)
    else:
        for number, task in enumerate(tasks):
            yield number, function(task)


def _in_processes(function: Function, tasks: Sequence[Task], count: int) -> Iterator:
    waiting = dict(enumerate(tasks))
    while waiting:
        try:
            for number, result in _in_pool(function, waiting, count):
                del waiting[number]
                yield number, result
        except BrokenProcessPool:
            # One of the oldest tasks did it: each of them gets a pool of its own.
            for number in list(waiting)[: count + PREFETCHED]:
                try:
                    [(_, result)] = _in_pool(function, {number: waiting[number]}, 1)
                except BrokenProcessPool:
                    result = None
                del waiting[number]
                yield number, result


def _in_pool(function: Function, tasks: dict[int, Task], count: int) -> Iterator:
    threads = max(1, (os.cpu_count() or 1) // count)
    pool = ProcessPoolExecutor(
        min(count, len(tasks)),
        multiprocessing.get_context("spawn"),  # a fork would copy locks of torch and FFmpeg
        _start_worker,
        (os.getpid(), threads),
    )
    try:
        futures = {pool.submit(function, task): number for number, task in tasks.items()}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except (KeyboardInterrupt, GeneratorExit):
        for process in multiprocessing.active_children():  # what they are at can be done again
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int, threads: int) -> None:
    """Dies with Ctrl-C, and with its parent, also when that is killed; shares the cores fairly."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(function: Function, tasks: Sequence[Task], workers: Workers) -> Iterator:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--ray needs Ray: pip install 'aiprod-trainer[ray]'.") from None
    try:
        ray.init(address=workers.ray, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"--ray {workers.ray}: no cluster can be reached ({first_line})."
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = {"value": function(json.loads(row["task"]))}
        except InputError as error:  # Ray would wrap it in a trace
            result = {"error": str(error)}
        return {"number": row["number"], "result": json.dumps(result)}

    rows = [{"number": number, "task": json.dumps(task)} for number, task in enumerate(tasks)]
    # A block a task: a result arrives when its own task is done.
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    for row in data.map(run, num_gpus=workers.gpus_each or None).iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise InputError(result["error"])
        yield int(row["number"]), result["value"]
