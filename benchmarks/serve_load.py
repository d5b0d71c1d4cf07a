"""Many clients at once on one server: is anything lost, made twice or kept waiting at the door?

    python benchmarks/serve_load.py --clients 200 --jobs 1000 --json serve_load.json

Starts `aiprod serve` on a loopback port. Every client has a connection of its own, submits a clip,
asks after it as often as the server says, and submits the next as soon as it is made, without time
to think. The clients arrive one after another within `--ramp` seconds; `--ramp 0` lets all of them
come at the same instant. Their loop runs in this process on the same cores: what they measure
includes their own waiting for it. A job made twice would have been claimed twice; the overhead of a
job is the time from the start of one to the start of the next, less what its pipeline took.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

PROMPT = "a red rubber ball bounces on a grey floor"
TINY = {"num_frames": 9, "num_inference_steps": 1, "cfg_scale": 1, "generate_audio": False}
START_TIMEOUT_S = 400.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--ramp", type=float, default=10.0, help="seconds until all have come")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--timeout", type=float, default=1500.0, help="seconds for all jobs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = start_server(options.model, Path(folder))
        try:
            result = asyncio.run(run_clients(url, options))
        finally:
            process.terminate()
            process.wait()
        result |= read_store(Path(folder) / "jobs.sqlite3", result.pop("ids"))
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def start_server(model: str, folder: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, ready to work. Its caller ends it, also when stopped itself."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit("stopped before the end"))
    command = [
        sys.executable, "-m", "aiprod_pipelines.cli", "serve", "--model", model, "--port", "0",
        "--data-dir", str(folder), "--device", "cpu", *more,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stderr is not None
    said: list[str] = []
    while not (said and said[-1].startswith("http")):
        line = process.stderr.readline()
        if not line:
            raise SystemExit(f"the server did not start: {''.join(said)}")
        said.append(line)
    url = said[-1].split()[0].rstrip(":")
    # Its log would fill the pipe and stop it.
    threading.Thread(target=process.stderr.read, daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == 200:
                return process, url
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    process.terminate()
    process.wait()
    raise SystemExit("the server was not ready in time")


async def run_clients(url: str, options: argparse.Namespace) -> dict[str, Any]:
    todo = iter(range(options.jobs))
    load = os.getloadavg()[0]  # of the machine: above 0 others compute there
    posts: list[float] = []
    refused = 0
    finals: dict[str, str] = {}
    context = ssl.create_default_context()  # one for all: each would take time to make

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60.0, verify=context) as http:
            await asyncio.sleep(options.ramp * number / options.clients)
            await work(http, random.Random(number))

    async def work(http: httpx.AsyncClient, draw: random.Random) -> None:
        nonlocal refused
        for seed in todo:
            body = {"prompt": PROMPT, "size": options.size, "seed": seed, **TINY}
            while True:
                started = time.perf_counter()
                answer = await http.post("/v1/videos", json=body)
                posts.append(time.perf_counter() - started)
                if answer.status_code != 429:
                    break
                refused += 1
                await asyncio.sleep(float(answer.headers["retry-after"]) * draw.uniform(1, 2))
            answer.raise_for_status()
            video = answer.json()
            wait_ms = answer.headers.get("openai-poll-after-ms", "500")
            while video["status"] in ("queued", "in_progress"):
                await asyncio.sleep(int(wait_ms) / 1000)
                answer = await http.get(f"/v1/videos/{video['id']}")
                video = answer.json()
                wait_ms = answer.headers.get("openai-poll-after-ms", "500")
            finals[video["id"]] = video["status"]

    httpx.post(f"{url}/v1/videos", json={"prompt": PROMPT, "size": options.size, **TINY})
    started = time.monotonic()
    tasks = [asyncio.create_task(client(number)) for number in range(options.clients)]
    done, late = await asyncio.wait(tasks, timeout=options.timeout)
    for task in late:
        task.cancel()
    for task in done:
        task.result()  # raises what a client met
    quantiles = statistics.quantiles(posts, n=100, method="inclusive")
    return {
        "clients": options.clients,
        "ramp_s": options.ramp,
        "submitted": options.jobs,
        "completed": sum(status == "completed" for status in finals.values()),
        "lost": options.jobs - len(finals),
        "refused_and_retried": refused,
        "post_p50_ms": round(quantiles[49] * 1000, 1),
        "post_p99_ms": round(quantiles[98] * 1000, 1),
        "post_max_ms": round(max(posts) * 1000, 1),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "clients_cpu_s": round(time.process_time(), 1),
        "total_s": round(time.monotonic() - started, 1),
        "jobs_per_s": round(options.jobs / (time.monotonic() - started), 2),
        "ids": list(finals),
    }


def read_store(path: Path, ids: list[str]) -> dict[str, Any]:
    """What the store says: jobs begun more than once, and the worker's time beside the pipeline."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute(
            "select id, attempt, started_at, finished_at, timings from jobs "
            "where status = 'completed' order by started_at"
        ).fetchall()
    rows = [row for row in rows if row[0] in set(ids)]
    # The worker always has a next job, so the time from start to start is what a job takes it.
    periods = [after[2] - before[2] for before, after in pairwise(rows)]
    generated = [json.loads(row[4])["total"] for row in rows]
    overheads = [period - total for period, total in zip(periods, generated, strict=False)]
    return {
        "duplicated": sum(row[1] > 1 for row in rows),
        "generation_ms": round(statistics.median(generated) * 1000, 1),
        "api_overhead_ms": round(statistics.median(overheads) * 1000, 1),
    }


if __name__ == "__main__":
    main()
