"""The whole server as its processes: started, its parts killed, stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from aiprod_pipelines import media
from aiprod_serve.cli import serve_app
from aiprod_serve.client import Client
from aiprod_serve.database import Database, sqlite_url
from aiprod_serve.jobs import JobStore

PROMPT = "a red ball bounces"


@pytest.fixture
def running(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """`aiprod serve` on a free port: its process, address and folder."""
    folder = tmp_path / "data"
    command = [
        sys.executable, "-m", "aiprod_pipelines.cli", "serve", "--model", f"tiny={tiny_model}",
        "--port", "0", "--data-dir", str(folder), "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = [process.stderr.readline()]
    while not said[-1].startswith("http://127.0.0.1:"):  # libraries may warn before
        assert said[-1], "".join(said)
        said.append(process.stderr.readline())
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield process, said[-1].split()[0].rstrip(":"), folder
    process.terminate()
    process.wait(60)


def children(process: subprocess.Popen[str], module: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if module.encode() not in path.read_bytes():
                continue
            if f"PPid:\t{process.pid}\n" in (path.parent / "status").read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for_worker(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("never ready")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds its processes in /proc")
def test_a_killed_worker_and_a_killed_web_process_lose_no_job_and_a_stop_gives_jobs_back(
    running: tuple[subprocess.Popen[str], str, Path], tmp_path: Path
):
    process, url, folder = running
    wait_for_worker(url)
    with Client(url) as client:
        videos = [client.create(PROMPT, seed=seed, num_frames=25)["id"] for seed in range(3)]
        for _ in client.watch(videos[0]):  # it is begun, or done
            break
        os.kill(children(process, "aiprod_serve.worker")[0], signal.SIGKILL)
        os.kill(children(process, "aiprod_serve.app")[0], signal.SIGKILL)
        # Not refused: the supervisor holds the socket.
        done = [client.wait(video) for video in videos]
        assert [video["status"] for video in done] == ["completed"] * 3
        for video in done:
            path = client.save(video, tmp_path / f"{video['id']}.mp4")
            assert media.probe(path).num_frames == 25
        long = client.create(PROMPT, num_inference_steps=200, num_frames=49)["id"]
        for video in client.watch(long):
            if video["status"] == "in_progress":
                break
    process.terminate()
    assert process.wait(60) == 0
    store = JobStore(Database(sqlite_url(folder)), keep_s=1, max_queue=1)
    job = store.get(long)
    assert job is not None and (job.status, job.crashes) == ("queued", 0)
    assert children(process, "aiprod_serve") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--ray", "--replicas", text], "try 1:4") for text in ("0", "2:1", "1:2:3", "many")]
    + [(["--replicas", "2"], "goes with --ray")],
)
def test_replicas_that_make_no_sense_are_refused(arguments: list[str], message: str):
    result = CliRunner().invoke(serve_app, arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
