"""The workers as replicas on a local Ray cluster: one is killed, and nothing is lost or twice."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from aiprod_pipelines import media
from aiprod_serve.client import Client
from aiprod_serve.database import Database, sqlite_url
from aiprod_serve.jobs import JobStore

pytestmark = pytest.mark.ray
pytest.importorskip("ray.serve", reason="needs Ray: pip install 'aiprod-serve[ray]'")

NUM_JOBS = 20
START_S = 120


@pytest.fixture
def running(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """`aiprod serve --ray` with two replicas: its process, address and folder."""
    folder = tmp_path / "data"
    command = [
        sys.executable, "-m", "aiprod_pipelines.cli", "serve", "--model", f"tiny={tiny_model}",
        "--port", "0", "--data-dir", str(folder), "--device", "cpu", "--ray", "--replicas", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = [process.stderr.readline()]
    while not said[-1].startswith("http://127.0.0.1:"):
        assert said[-1], "".join(said)
        said.append(process.stderr.readline())
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield process, said[-1].split()[0].rstrip(":"), folder
    process.terminate()
    process.wait(90)


def replicas(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "ray::ServeReplica" in " ".join(child.cmdline()[:1])]


def wait_for_workers(url: str, count: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        answer = httpx.get(f"{url}/ready", timeout=60).json()
        if answer["workers"] == count:
            return
        time.sleep(0.2)
    raise AssertionError("never ready")


def test_a_killed_replica_loses_no_job_makes_none_twice_and_is_replaced(
    running: tuple[subprocess.Popen[str], str, Path], tmp_path: Path
):
    process, url, folder = running
    wait_for_workers(url, 2)
    with Client(url) as client:
        videos = [
            client.create("a red ball bounces", seed=seed, num_frames=25, num_inference_steps=20)
            for seed in range(NUM_JOBS)
        ]
        # Both work; one dies at it.
        store = JobStore(Database(sqlite_url(folder)), keep_s=1, max_queue=1)
        while len({job.worker for job in store.page(None, limit=NUM_JOBS) or []} - {None}) < 2:
            time.sleep(0.1)
        replicas(process)[0].send_signal(signal.SIGKILL)
        done = [client.wait(video["id"]) for video in videos]
        assert [video["status"] for video in done] == ["completed"] * NUM_JOBS
        for video in done:
            path = client.save(video, tmp_path / f"{video['id']}.mp4")
            assert media.probe(path).num_frames == 25
        assert len(list((folder / "results").iterdir())) == NUM_JOBS
        sums = store.statistics()["counters"]
        assert (sums["completed"], sums["failed"]) == (NUM_JOBS, 0)
        # Every attempt ended in a clip, but for the one that was interrupted.
        jobs = [store.get(video["id"]) for video in videos]
        assert sum(job.attempt for job in jobs if job) == NUM_JOBS + sums["interrupted"]
        assert sums["interrupted"] == sums["worker_restarts"] == 1
        wait_for_workers(url, 2)

        # A stop gives back what runs, and blames nobody.
        long = client.create("a blue ball", num_inference_steps=200, num_frames=49)["id"]
        for video in client.watch(long):
            if video["status"] == "in_progress":
                break
    process.terminate()
    assert process.wait(90) == 0
    job = store.get(long)
    assert job is not None and (job.status, job.crashes) == ("queued", 0)
