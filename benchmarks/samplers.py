"""Which sampler comes nearest to the exact solution, for how many model calls.

    python benchmarks/samplers.py --model nano --seeds 16 --json samplers.json

Every seed's clip is made by Euler in 200 steps, the reference, and by each sampler in few steps
from the same noise, with the model's own schedule and guidance. The distance is the root mean
square difference of the final latents over the root mean square of the reference, picture and
sound each, and their mean. Two claims are judged seed by seed: gradient estimation in 20 steps is
at least as near as Euler in 40, and DPM++ 2M in 15 as Euler in 30; the interval is a bootstrap
over seeds.
res-2s draws noise of its own, so it is not expected to come near.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiprod_core.errors import InputError
from aiprod_core.model.transformer import Transformer
from aiprod_core.types import AV
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."
RUNS = (
    ("euler", 15), ("euler", 20), ("euler", 30), ("euler", 40),
    ("gradient-estimation", 15), ("gradient-estimation", 20),
    ("dpmpp-2m", 15), ("dpmpp-2m", 20),
    ("heun", 10), ("heun", 20),
    ("res-2s", 10), ("res-2s", 20),
)  # fmt: skip
CLAIMS = (
    (("gradient-estimation", 20), ("euler", 40)),
    (("dpmpp-2m", 15), ("euler", 30)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--num-frames", type=int, help="default: the model's")
    parser.add_argument("--claims-only", action="store_true", help="a third of the work")
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline = TI2VidOneStagePipeline.from_model(options.model)
    calls = count_calls()
    runs = [run for claim in CLAIMS for run in claim] if options.claims_only else list(RUNS)
    distances: dict[tuple[str, int], list[AV]] = {run: [] for run in runs}
    calls_of: dict[tuple[str, int], int] = {}
    for seed in range(options.seeds):

        def latents(sampler: str, steps: int, seed: int = seed) -> AV:
            return pipeline(
                options.prompt,
                seed=seed,
                sampler=sampler,
                num_inference_steps=steps,
                num_frames=options.num_frames,
            ).latents

        reference = latents("euler", options.reference_steps)
        for run in runs:
            before = calls[0]
            distances[run].append(distance(latents(*run), reference))
            calls_of[run] = calls[0] - before
        print(f"seed {seed} done", file=sys.stderr, flush=True)

    joint = {run: np.array([mean(d) for d in of_run]) for run, of_run in distances.items()}
    rows = [
        {
            "sampler": run[0],
            "steps": run[1],
            "model_calls": calls_of[run],
            **{f"{name}_distance": spread(distances[run], name) for name in ("video", "audio")},
            "distance": round(float(joint[run].mean()), 4),
        }
        for run in runs
    ]
    claims = [judge(joint, *claim) for claim in CLAIMS]
    result = {
        "model": options.model,
        "seeds": options.seeds,
        "reference": f"euler, {options.reference_steps} steps",
        "runs": rows,
        "claims": claims,
    }
    print_table(rows)
    for claim in claims:
        print(f"{claim['claim']}: {'holds' if claim['holds'] else 'does not hold'} ({claim})")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(claim["holds"] for claim in claims) else 1


def count_calls() -> list[int]:
    """A count that every call of a transformer adds to."""
    calls, original = [0], Transformer.forward

    def forward(self: Transformer, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        return original(self, *args, **options)

    Transformer.forward = forward
    return calls


def distance(latents: AV, reference: AV) -> AV:
    """Per modality, as a scalar tensor."""

    def relative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().mean().sqrt() / b.square().mean().sqrt()

    return latents.map(relative, reference)


def mean(distances: AV) -> float:
    present = [float(d) for d in (distances.video, distances.audio) if d is not None]
    return sum(present) / len(present)


def spread(distances: list[AV], name: str) -> dict[str, float] | None:
    """Median and quartiles over seeds."""
    values = [float(d) for one in distances if (d := getattr(one, name)) is not None]
    if not values:
        return None
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def judge(
    joint: dict[tuple[str, int], np.ndarray], few: tuple[str, int], many: tuple[str, int]
) -> dict[str, Any]:
    """Whether a sampler in few steps is as near as another in many, on the mean over seeds."""
    ratio = joint[few] / joint[many]
    draws = np.random.default_rng(0).choice(ratio, (10_000, len(ratio)))
    low, high = np.quantile(draws.mean(axis=1), (0.025, 0.975))
    return {
        "claim": f"{few[0]} in {few[1]} steps is as near as {many[0]} in {many[1]}",
        "holds": bool(ratio.mean() <= 1),
        "mean_ratio": round(float(ratio.mean()), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "seeds_as_near": f"{int((ratio <= 1).sum())} of {len(ratio)}",
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| sampler | steps | model calls | picture | sound | distance |")
    print("|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["distance"]):
        parts = [row[f"{name}_distance"] for name in ("video", "audio")]
        shown = [f"{part['median']:.3f}" if part else "-" for part in parts]
        print(
            f"| {row['sampler']} | {row['steps']} | {row['model_calls']} | {' | '.join(shown)} | "
            f"{row['distance']:.3f} |"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
