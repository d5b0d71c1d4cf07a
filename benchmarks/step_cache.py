"""What step caching gains and costs: computed steps, speed ratio, PSNR to the same run without it.

    python benchmarks/step_cache.py --model nano --steps 40 8 --json step_cache.json

For each number of steps and each prompt, runs without cache and with each policy alternate, and
the ratio of denoising times is taken within each pair; medians are reported. PSNR is that of the
decoded frames (peak 255). The ratio of model calls is printed beside: it is what the ratio of
times tends to, whatever else the machine does.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.components import denoising
from aiprod_core.components.step_cache import POLICIES, StepCache
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.pipeline import Pipeline

PROMPTS = (
    "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact.",
    "A blue cube slides from left to right over a wooden floor, scraping softly.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipeline", default="one-stage")
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 8])
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline = find_pipeline(options.pipeline).from_model(options.model)
    settings = {"num_frames": options.num_frames}
    pipeline(PROMPTS[0], num_inference_steps=1, **settings)  # loads and warms everything up
    result: dict[str, Any] = {
        "model": options.model,
        "device": str(pipeline.models.device),
        "threads": torch.get_num_threads(),
        "steps": {
            str(steps): measure(pipeline, PROMPTS[: options.prompts], steps, settings)
            for steps in options.steps
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def measure(
    pipeline: Pipeline, prompts: tuple[str, ...], steps: int, settings: dict[str, Any]
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in POLICIES}
    for seed, prompt in enumerate(prompts):
        for name in POLICIES:
            plain = pipeline(prompt, seed=seed, num_inference_steps=steps, **settings)
            calls: list[StepCache] = []
            with counted(calls):
                cached = pipeline(
                    prompt, seed=seed, num_inference_steps=steps, step_cache=name, **settings
                )
            (cache,) = calls
            times = [clip.progress.seconds["denoise"] for clip in (plain, cached)]
            runs[name].append(
                {
                    "speed_ratio": times[0] / times[1],
                    "call_ratio": (cache.computed + cache.skipped) / cache.computed,
                    "psnr_db": psnr(frames(plain), frames(cached)),
                }
            )
    return {
        name: {key: round(statistics.median(run[key] for run in found), 2) for key in found[0]}
        | {"runs": found}
        for name, found in runs.items()
    }


class counted:
    """Within it, the caches that runs make are listed."""

    def __init__(self, caches: list[StepCache]) -> None:
        self.caches = caches

    def __enter__(self) -> None:
        def make(*arguments: Any) -> StepCache:
            self.caches.append(StepCache(*arguments))
            return self.caches[-1]

        denoising.StepCache = make  # pyright: ignore

    def __exit__(self, *error: object) -> None:
        denoising.StepCache = StepCache  # pyright: ignore


def frames(clip: Clip) -> Tensor:
    return torch.cat(list(clip.frames())).float()


def psnr(a: Tensor, b: Tensor) -> float:
    return round(float(10 * torch.log10(255**2 / (a - b).square().mean().clamp(min=1e-9))), 2)


if __name__ == "__main__":
    main()
