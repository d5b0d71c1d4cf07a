"""What a prompt costs the second time: text encoder not loaded, same bits, time to the first step.

    python benchmarks/warm_prompt.py --model nano --json warm_prompt.json

Each run is a fresh process with a cache folder of its own: cold with an empty one, warm with what
the cold run has left. Time counts from the opened model to the first denoised step; imports and
headers are the same in both and not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipeline", default="one-stage")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(options)))
        return
    pairs = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append([in_a_process(options, folder), in_a_process(options, folder)])
    result = {
        "model": options.model,
        "bit_identical": all(cold["latents"] == warm["latents"] for cold, warm in pairs),
        "encoder_loaded": any(warm["encoder_loaded"] for _, warm in pairs),
        "encoder_loaded_cold": all(cold["encoder_loaded"] for cold, _ in pairs),
        "first_step_ratio": round(
            statistics.median(cold["first_step_s"] / warm["first_step_s"] for cold, warm in pairs),
            2,
        ),
        "runs": pairs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def in_a_process(options: argparse.Namespace, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", "--model", options.model]
    command += ["--pipeline", options.pipeline, "--steps", str(options.steps)]
    environment = {**os.environ, "AIPROD_CACHE_DIR": cache}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def one_run(options: argparse.Namespace) -> dict[str, Any]:
    from aiprod_pipelines.catalog import find_pipeline
    from aiprod_pipelines.progress import Progress

    class FirstStep(Progress):
        at: float | None = None

        def preview(self, latents: Any) -> None:
            self.at = self.at or time.monotonic()

    pipeline = find_pipeline(options.pipeline).from_model(options.model)
    progress = FirstStep()
    started = time.monotonic()
    clip = pipeline(PROMPT, num_inference_steps=options.steps, progress=progress)
    assert progress.at is not None
    return {
        "first_step_s": round(progress.at - started, 3),
        "encode_prompt_s": round(progress.seconds["encode prompt"], 3),
        "encoder_loaded": "transformers" in sys.modules,
        "latents": clip.recipe["latents_sha256"],
    }


if __name__ == "__main__":
    main()
