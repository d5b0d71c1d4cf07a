"""Many clips from a file of prompts: here one after the other, or over a Ray cluster.

    {"prompt": "a red ball bounces", "seed": 7, "output": "ball.mp4"}

Each line is a request by its fields, or a prompt alone; `output` names its file, else its number
does. What was made and what failed goes into `manifest.jsonl`, a line each as soon as it is known,
so a batch that was stopped goes on where it was: a clip that is there and whose line says the same
request is not made again. Clips appear under their names when they are whole, so one that a dying
worker was making is made again by another, and none is there twice.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError
from aiprod_pipelines import analytics
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.request import GenerationRequest

MANIFEST = "manifest.jsonl"
ATTEMPTS = 3  # of a clip whose worker died


@dataclass(frozen=True)
class Job:
    """One line of the file: a request, where its clip goes, and a name for what it asks."""

    number: int
    request: dict[str, Any]
    output: str
    digest: str


Make = Callable[[Job], dict[str, Any]]


def read_jobs(path: Path, options: Mapping[str, Any], suffix: str = ".mp4") -> list[Job]:
    """The jobs of a JSONL file; `options` decide the clips beside the requests.

    Raises InputError, naming the line, for what is no request and for outputs named twice.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a JSONL file with a prompt on each line.")
    jobs: list[Job] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error}).") from None
        values = {"prompt": values} if isinstance(values, str) else values
        if not isinstance(values, dict):
            raise InputError(f"{where}: a line is a prompt or an object with one.")
        output = str(values.pop("output", f"{number:05}{suffix}"))
        if Path(output).name != output or output == MANIFEST:
            raise InputError(f"{where}: output is a file name without folders; got {output}.")
        try:
            request = GenerationRequest.from_dict(values).to_dict()
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        text = json.dumps([request, dict(options)], sort_keys=True)
        jobs.append(Job(number, request, output, hashlib.sha256(text.encode()).hexdigest()))
    outputs = [job.output for job in jobs]
    repeated = next((name for name in outputs if outputs.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"{path}: two lines write {repeated}; give them different outputs.")
    return jobs


def run_batch(
    jobs: Sequence[Job],
    folder: Path,
    make_all: Callable[[Sequence[Job]], Iterator[dict[str, Any]]],
    tell: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Makes what is not there yet and returns the last line of every job, in order.

    `make_all` yields a manifest entry for each job it is given, in any order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    known = {entry["output"]: entry for entry in _read_manifest(manifest)}
    open_jobs = [job for job in jobs if not _is_done(job, known.get(job.output), folder)]
    with manifest.open("a", encoding="utf-8") as file:
        for entry in make_all(open_jobs):
            known[entry["output"]] = entry
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            tell(entry)
    return [known[job.output] for job in jobs if job.output in known]


def made_here(pipeline: str, options: Mapping[str, Any], folder: Path) -> Make:
    """Makes clips in this process with one opened model."""
    opened = find_pipeline(pipeline).from_model(**options)

    def make(job: Job) -> dict[str, Any]:
        entry = {"number": job.number, "output": job.output, "digest": job.digest}
        try:
            with analytics.run("batch"):
                clip = opened.run(GenerationRequest.from_dict(job.request))
                clip.save(folder / job.output)
        except Exception as error:  # one clip must not end the batch; the manifest says what it was
            return {**entry, "status": "failed", "error": f"{type(error).__name__}: {error}"}
        report = clip.report(folder / job.output)
        return {**entry, "status": "done", "report": report}

    return make


def one_after_the_other(make: Make) -> Callable[[Sequence[Job]], Iterator[dict[str, Any]]]:
    return lambda jobs: map(make, jobs)


def over_ray(
    address: str,
    pipeline: str,
    options: Mapping[str, Any],
    folder: Path,
    *,
    workers: int | None = None,
) -> Callable[[Sequence[Job]], Iterator[dict[str, Any]]]:
    """Makes clips on a Ray cluster, or with `local` on workers of this machine.

    Each worker opens the model once. A clip whose worker dies is given to another, up to ATTEMPTS
    times. The folder must be one that all nodes share. Raises InputError without Ray.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError(
            'a batch over a cluster needs Ray: pip install "aiprod-pipelines[ray]"'
        ) from None
    find_pipeline(pipeline).from_model(**options)  # what is wrong with the model is said here
    if not ray.is_initialized():
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to Ray's makers
        ray.init(
            address,
            num_cpus=workers if address == "local" else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    @ray.remote(num_cpus=1, num_gpus=gpus)
    class Worker:
        def __init__(self) -> None:
            self.make = made_here(pipeline, options, folder)

        def run(self, job: Job) -> dict[str, Any]:
            return self.make(job)

    def make_all(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        waiting = [(job, 1) for job in reversed(jobs)]
        running: dict[Any, tuple[Any, Job, int]] = {}
        idle = [Worker.remote() for _ in range(min(count, len(jobs)))]
        while waiting or running:
            while waiting and idle:
                worker = idle.pop()
                job, attempt = waiting.pop()
                running[worker.run.remote(job)] = (worker, job, attempt)
            (finished,), _ = ray.wait(list(running), num_returns=1)
            worker, job, attempt = running.pop(finished)
            try:
                entry = ray.get(finished)
                idle.append(worker)
            except RayActorError as error:
                idle.append(Worker.remote())
                if attempt < ATTEMPTS:
                    waiting.append((job, attempt + 1))
                    continue
                entry = {"number": job.number, "output": job.output, "digest": job.digest}
                entry |= {"status": "failed", "error": f"its workers died: {error}"}
            yield entry

    return make_all


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last may have been cut."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def _is_done(job: Job, entry: dict[str, Any] | None, folder: Path) -> bool:
    if entry is None or entry["status"] != "done" or entry["digest"] != job.digest:
        return False
    return (folder / job.output).is_file()
