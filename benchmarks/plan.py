"""How near the flight plan comes: predicted against measured peak memory and time.

    python benchmarks/plan.py --model nano --json plan.json

Settings of different length, size and guidance run each in a fresh process, first a few from which
rates are learnt, then those that are judged. Memory is the process's high-water mark against the
plan's peak, with what the process held when the plan was made; time is that of the planned stages.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."
LEARNT = (
    {"num_frames": 9, "num_inference_steps": 4},
    {"num_frames": 49, "num_inference_steps": 4, "height": 96, "width": 96},
)
JUDGED = (
    {"num_frames": 9, "num_inference_steps": 6},
    {"num_frames": 25, "num_inference_steps": 4},
    {"num_frames": 25, "num_inference_steps": 4, "cfg_scale": 1.0},
    {"num_frames": 25, "num_inference_steps": 4, "generate_audio": False},
    {"num_frames": 25, "num_inference_steps": 4, "max_batch_size": 1},
    {"num_frames": 49, "num_inference_steps": 4},
    {"num_frames": 49, "num_inference_steps": 4, "stg_scale": 1.0, "stg_blocks": (1,)},
    {"num_frames": 25, "num_inference_steps": 4, "height": 96, "width": 96},
    {"num_frames": 25, "num_inference_steps": 4, "height": 128, "width": 128},
    {"num_frames": 9, "num_inference_steps": 4, "height": 192, "width": 192},
    {"num_frames": 97, "num_inference_steps": 3},
    {"num_frames": 25, "num_inference_steps": 3, "sampler": "heun"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipeline", default="one-stage")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(options, json.loads(options.one))))
        return
    with tempfile.TemporaryDirectory() as cache:
        for settings in (*LEARNT, *LEARNT):  # cold, then with the prompt known
            in_a_process(options, settings, cache)
        runs = [in_a_process(options, settings, cache) for settings in JUDGED]
    errors = {
        what: [abs(run[f"{what}_planned"] / run[f"{what}_measured"] - 1) for run in runs]
        for what in ("memory", "time")
    }
    result = {
        "model": options.model,
        "settings": len(runs),
        "memory_error_max": round(max(errors["memory"]), 3),
        "memory_error_median": round(statistics.median(errors["memory"]), 3),
        "time_error_max": round(max(errors["time"]), 3),
        "time_error_median": round(statistics.median(errors["time"]), 3),
        "runs": runs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def in_a_process(
    options: argparse.Namespace, settings: dict[str, Any], cache: str
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", options.model, "--one", json.dumps(settings)]
    command += ["--pipeline", options.pipeline]
    environment = {**os.environ, "AIPROD_CACHE_DIR": cache}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def one_run(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    from aiprod_pipelines.catalog import find_pipeline
    from aiprod_pipelines.clip import peak_memory_mib
    from aiprod_pipelines.plan import learn, make_plan
    from aiprod_pipelines.request import GenerationRequest

    pipeline = find_pipeline(options.pipeline).from_model(options.model)
    request = GenerationRequest(PROMPT, **settings)
    plan = make_plan(pipeline, request)
    clip = pipeline.run(request)
    with tempfile.TemporaryDirectory() as folder:
        clip.save(Path(folder) / "clip.mp4")
    learn(plan, clip.progress.seconds, pipeline.models)
    measured = clip.progress.seconds
    stages = {
        stage.name: (stage.seconds, measured[stage.name])
        for stage in plan.stages
        if stage.seconds is not None and stage.name in measured
    }
    return {
        "settings": settings,
        "memory_planned": plan.peak_bytes / 2**20,
        "memory_measured": peak_memory_mib(pipeline.models.device),
        "time_planned": sum(planned for planned, _ in stages.values()),
        "time_measured": sum(seconds for _, seconds in stages.values()),
        "stages": stages,
    }


if __name__ == "__main__":
    main()
