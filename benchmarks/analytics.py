"""What analytics see of a run, and what they cost it.

    python benchmarks/analytics.py --json analytics.json

Makes clips by `aiprod generate`, each in a process of its own, in turns with and without analytics.

`covered_share`  the least share of a run's wall time, from the start of its process to its last
                 word, that lies within named stages
`cost_share`     the time that writing a run's own lines takes, over the run's: as many spans of the
                 same kinds are opened, closed and written again in a row, ten times over, and the
                 median taken
`paired_share`   processor time of the runs with analytics over those without, minus 1, median over
                 the pairs: the same by other means, but no finer than the machine is quiet
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aiprod_pipelines import analytics, stats

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."
GOALS = {"covered_share": 0.98, "cost_share": 0.01}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        records = Path(place) / "records"
        ratios = []
        for number in range(options.pairs + 1):
            on = _generate(options, Path(place), str(records), number)
            off = _generate(options, Path(place), "off", number)
            if number > 0:  # the first fills caches
                ratios.append(on / off - 1)
        runs = stats.read_runs(records)[1:]
        costs = [_cost_s(run, Path(place) / "again") / run.seconds for run in runs]
        spans = [len(run.spans) for run in runs]
    covered, cost = min(run.covered_share for run in runs), statistics.median(costs)
    result = {
        "model": options.model,
        "steps": options.steps,
        "runs": len(runs),
        "spans_per_run": statistics.median(spans),
        "seconds": round(statistics.median(run.seconds for run in runs), 2),
        "covered_share": round(covered, 4),
        "cost_share": round(cost, 6),
        "paired_share": round(statistics.median(ratios), 4),
        "reached": covered >= GOALS["covered_share"] and cost < GOALS["cost_share"],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    return 0 if result["reached"] else 1


def _generate(options: argparse.Namespace, place: Path, records: str, seed: int) -> float:
    """Processor seconds of a run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            *(sys.executable, "-m", "aiprod_pipelines.cli", "generate", PROMPT),
            *("-m", options.model, "--steps", str(options.steps), "--seed", str(seed)),
            *("-o", str(place / "clip.mp4")),
        ],
        env={**os.environ, "AIPROD_ANALYTICS": records},
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _cost_s(run: stats.Run, folder: Path) -> float:
    """Seconds that a run's lines take, energy counters and all."""
    os.environ["AIPROD_ANALYTICS"] = str(folder)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        with analytics.run(run.command):
            analytics.note(**run.facts)
            for part in run.spans:
                if part.parent is None:
                    with analytics.span(part.name):
                        pass
                else:
                    with analytics.span("stage"), analytics.span(part.name):
                        for name, number in part.counts.items():
                            analytics.count(name, number)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
