"""Prepares 200 clips of which 3 are corrupt, once in peace and once killed again and again.

    python benchmarks/prepare_dataset.py --model nano --json prepare_dataset.json

The clips are made from the procedural world. The second preparation is killed (SIGKILL, with its
worker processes) as often as `--kills` says, each time when it has got a little further; then every
byte of both folders is compared. `clips_per_s` is that of the first, start of the processes, two
decodings and the encoding of picture, sound and text included.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from aiprod_pipelines import media
from aiprod_trainer.world.captions import caption
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clips", type=int, default=200, help="3 corrupt ones included")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--bucket", default="64x64x25")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    corrupt = make_footage(folder / "footage", options.clips, options.size)
    command = [sys.executable, "-m", "aiprod_pipelines.cli", "dataset", "process-dataset"]
    command += [str(folder / "footage/clips.jsonl"), "--model", options.model]
    command += ["--resolution-buckets", options.bucket, "--clips-per-part", "16"]
    command += ["--workers", str(options.workers), "-o"]

    started = time.monotonic()
    subprocess.run([*command, str(folder / "whole")], check=True)
    seconds = time.monotonic() - started
    skipped = [json.loads(line) for line in (folder / "whole/skipped.jsonl").open()]

    kills = []
    for number in range(options.kills):
        kills.append(run_and_kill([*command, str(folder / "killed")], folder / "killed", number))
    subprocess.run([*command, str(folder / "killed")], check=True)
    return {
        "model": options.model,
        "bucket": options.bucket,
        "workers": options.workers,
        "clips": options.clips,
        "corrupt_made": sorted(corrupt),
        "corrupt_reported": sorted(line["clip"] for line in skipped),
        "exact_report": sorted(corrupt) == sorted(line["clip"] for line in skipped),
        "reasons": [line["reason"].removeprefix(f"{folder}/footage/") for line in skipped],
        "killed_at": kills,
        "identical_after_kill": contents(folder / "whole") == contents(folder / "killed"),
        "seconds": round(seconds, 1),
        "clips_per_s": round(options.clips / seconds, 2),
    }


def make_footage(folder: Path, count: int, size: int) -> set[str]:
    """Clips with captions in clips.jsonl. Returns the names of three that are then spoilt."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    rows = []
    for index in track(range(count), description="clips"):
        scene = sample_scene(rng, world="v1")
        sound = media.Audio(synthesise(scene).astype(np.float32), SAMPLE_RATE)
        name = f"clip{index:04d}.mp4"
        media.write_video(folder / name, [render(scene, size)], scene.fps, audio=sound)
        rows.append({"video": name, "caption": caption(scene, rng)})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    short, damaged, text = (folder / rows[count * i // 4]["video"] for i in (1, 2, 3))
    data = short.read_bytes()
    start = data.find(b"mdat")
    short.write_bytes(data[: start + (len(data) - start) // 2])
    data = bytearray(damaged.read_bytes())
    start = data.find(b"mdat") + 700
    data[start : start + 100] = bytes(100)
    damaged.write_bytes(data)
    text.write_text("not a video")
    return {path.name for path in (short, damaged, text)}


def run_and_kill(command: list[str], out: Path, number: int) -> str:
    """Starts a preparation and kills it: the first time among the checks, then among the parts.

    Returns how far it was.
    """
    process = subprocess.Popen(command, start_new_session=True)
    before = progress_of(out)
    wanted = (before[0] + 20, 0) if number == 0 else (0, before[1] + 2)
    while process.poll() is None:
        now = progress_of(out)
        if now[0] >= wanted[0] and now[1] >= wanted[1]:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"{now[0]} checked, {now[1]} part files"
        time.sleep(0.02)
    raise RuntimeError("the preparation ended before it could be killed.")


def progress_of(out: Path) -> tuple[int, int]:
    checks = out / ".checks.jsonl"
    checked = checks.read_bytes().count(b"\n") if checks.is_file() else 0
    return checked, len(list(out.glob("part-*.safetensors")))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    main()
