"""What killed processes and a full disk do to jobs.

    python benchmarks/serve_faults.py --jobs 100 --kills 10 --json serve_faults.json

Starts `aiprod serve`, submits jobs, and kills the web process and the worker each `--kills` times
at random moments while they are made. Then every job must be completed, once, and its file must
decode from end to end and be the clip that its seed makes. With `--full-disk FOLDER`, the mount
point of a small file system (mount -t tmpfs -o size=64m none FOLDER), a second server works there
while the disk is full, and again when it is not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from serve_load import PROMPT, TINY, start_server

from aiprod_pipelines import media
from aiprod_pipelines.recipe import read_recipe
from aiprod_serve.client import Client

FIELDS = {**TINY, "generate_audio": True, "size": "64x64"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--kills", type=int, default=10, help="of each process")
    parser.add_argument("--full-disk", type=Path, metavar="FOLDER")
    parser.add_argument("--timeout", type=int, default=1500, help="seconds for all of it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.alarm(options.timeout)
    with tempfile.TemporaryDirectory() as folder:
        result = kill_at_random(options.model, Path(folder), options.jobs, options.kills)
    if options.full_disk is not None:
        result["full_disk"] = fill_the_disk(options.model, options.full_disk)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def kill_at_random(model: str, folder: Path, num_jobs: int, num_kills: int) -> dict[str, Any]:
    process, url = start_server(model, folder)
    draw = random.Random(0)
    killed = {"aiprod_serve.app": 0, "aiprod_serve.worker": 0}
    is_over = threading.Event()

    def kill() -> None:
        order = [name for name in killed for _ in range(num_kills)]
        draw.shuffle(order)
        for name in order:
            while not is_over.wait(draw.uniform(1.0, 4.0)):
                if pid := child_of(process, name):
                    os.kill(pid, signal.SIGKILL)
                    killed[name] += 1
                    break

    killer = threading.Thread(target=kill)
    started = time.monotonic()
    try:
        with Client(url) as client:
            ids = [create(client, seed) for seed in range(num_jobs)]
            killer.start()
            finals = [client.wait(video) for video in ids]
            is_over.set()
            killer.join()
            numbers = {
                status: sum(video["status"] == status for video in finals)
                for status in ("completed", "failed", "cancelled")
            }
            intact = sum(is_intact(client, video, folder) for video in finals)
    finally:
        is_over.set()
        process.terminate()
        process.wait()
    return {
        "jobs": num_jobs,
        "web_kills": killed["aiprod_serve.app"],
        "worker_kills": killed["aiprod_serve.worker"],
        **numbers,
        "distinct": len(set(ids)),
        "intact": intact,
        "total_s": round(time.monotonic() - started, 1),
    }


def create(client: Client, seed: int) -> str:
    return client.create(PROMPT, seed=seed, **FIELDS)["id"]


def is_intact(client: Client, video: dict[str, Any], folder: Path) -> bool:
    """Whether the file decodes whole and was made from its own seed."""
    if video["status"] != "completed":
        return False
    path = client.save(video, folder / "fetched.mp4")
    num_frames = sum(1 for _ in media.read_frames(path))
    media.read_audio(path)
    request = read_recipe(path)["request"]
    return num_frames == TINY["num_frames"] and request["seed"] == video["seed"]


def child_of(process: subprocess.Popen[str], module: str) -> int | None:
    """The process of a module that the supervisor has started, if it runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_module = module.encode() in path.read_bytes()
            if is_module and f"PPid:\t{process.pid}\n" in (path.parent / "status").read_text():
                return int(path.parent.name)
        except OSError:
            continue
    return None


def fill_the_disk(model: str, folder: Path) -> dict[str, Any]:
    """States of jobs before, while and after the file system of `folder` is full."""
    data = folder / "data"
    data.mkdir()
    process, url = start_server(model, data)
    ballast = folder / "ballast"
    try:
        with Client(url) as client:
            before = client.wait(create(client, 1))
            # Begun with room for its row, and none for its clip.
            slow = client.create(PROMPT, **{**FIELDS, "num_inference_steps": 100})["id"]
            for video in client.watch(slow):
                if video["stage"] == "denoise":
                    break
            fill(ballast)
            while_full = client.wait(slow)
            is_healthy = client.http.get("/health").status_code == 200
            ballast.unlink()
            after = client.wait(create(client, 2))
    finally:
        process.terminate()
        process.wait()
        ballast.unlink(missing_ok=True)
    return {
        "before": before["status"],
        "while_full": while_full["status"],
        "error": while_full["error"],
        "healthy_while_full": is_healthy,
        "after": after["status"],
    }


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:  # a buffer would be flushed once more on closing
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


if __name__ == "__main__":
    main()
