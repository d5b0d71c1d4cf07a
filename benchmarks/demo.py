"""How long the demo's clip takes from a cold start: a new process, model loading included.

    python benchmarks/demo.py --json demo.json

Runs `aiprod generate` in fresh processes and reports the median wall time and the stages of that
run. The first run of a machine also reads the weights from disk; it is reported apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "a red rubber ball bounces on the floor, with a thud at each bounce"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--runs", type=int, default=3, help="after the first")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [generate(arguments.model, Path(folder)) for _ in range(arguments.runs + 1)]
    walls = [run["wall_seconds"] for run in runs[1:]]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "first_run_seconds": runs[0]["wall_seconds"],
        "median_seconds": statistics.median(walls),
        "stage_seconds": runs[-1]["seconds"],
        "peak_memory_mib": runs[-1]["peak_memory_mib"],
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


def generate(model: str, folder: Path) -> dict:
    started = time.perf_counter()
    command = [sys.executable, "-m", "aiprod_pipelines.cli", "generate", PROMPT]
    command += ["--model", model, "--pipeline", "two-stages", "--seed", "4"]
    command += ["--enlarge", "4", "--json"]
    finished = subprocess.run(
        [*command, "-o", str(folder / "demo.mp4")], check=True, capture_output=True, text=True
    )
    report = json.loads(finished.stdout.splitlines()[-1])
    return report | {"wall_seconds": round(time.perf_counter() - started, 2)}


if __name__ == "__main__":
    sys.exit(main())
