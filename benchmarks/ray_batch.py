"""A batch over a local Ray cluster, one of whose workers is killed on the way.

    python benchmarks/ray_batch.py --model nano --prompts 20 --json ray_batch.json

Runs `aiprod batch --ray local --workers 2`, kills a worker process after the third clip, and counts
what is there: every clip, and every line of the manifest, once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--num-frames", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = [
            {
                "prompt": f"a red ball bounces {number} times",
                "num_inference_steps": options.steps,
                "num_frames": options.num_frames,
            }
            for number in range(options.prompts)
        ]
        prompts = folder / "prompts.jsonl"
        prompts.write_text("\n".join(json.dumps(line) for line in lines))
        clips = folder / "clips"
        command = [sys.executable, "-m", "aiprod_pipelines.cli", "batch", str(prompts), "--json"]
        command += ["-o", str(clips), "-m", options.model, "--ray", "local", "--workers", "2"]
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        killed = kill_a_worker(process, clips / "manifest.jsonl", after=3)
        output, _ = process.communicate()
        seconds = time.monotonic() - started
        entries = [json.loads(line) for line in (clips / "manifest.jsonl").open()]
        counts = Counter(entry["output"] for entry in entries)
        result = {
            "prompts": options.prompts,
            "worker_killed": killed,
            "clips": len(list(clips.glob("*.mp4"))),
            "done": sum(entry["status"] == "done" for entry in entries),
            "most_often": max(counts.values()),
            "exit_code": process.returncode,
            "report": json.loads(output.splitlines()[-1]),
            "seconds": round(seconds, 1),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def kill_a_worker(driver: subprocess.Popen[str], manifest: Path, after: int) -> bool:
    """Kills one of the driver's Ray workers once `after` clips are there."""
    while driver.poll() is None:
        if manifest.is_file() and len(manifest.read_text().splitlines()) >= after:
            for process in psutil.Process(driver.pid).children(recursive=True):
                if "ray::Worker" in " ".join(process.cmdline()):
                    process.kill()
                    return True
        time.sleep(0.2)
    return False


if __name__ == "__main__":
    main()
