"""Whether a second stage is worth its time: its picture against bicubic x2 of its own first stage.

    python benchmarks/two_stage.py --model nano --count 32 --json two_stage.json

Each prompt of the world is made in two stages, and once more without the second: the same seed
gives the same first stage, which is enlarged. Both are looked at by the world's judge (share right
of what the prompt states of the picture) and compared with the nearest true render: of `--renders`
scenes of the judged first stage's kind, the one that the first stage resembles most. PSNR is in dB
at the full size, `detail` the sharpness (mean absolute Laplacian) over that of the render. The
claim is about the score: it holds where its mean is at least that of the enlarged first stage. The
PSNR is given beside it; it rewards what is blurred where nothing certain can be said. Intervals are
bootstraps over prompts. Exit code 1 where the claim does not hold.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.request import GenerationRequest
from aiprod_trainer.evaluation.prompts import Prompt, world_prompts
from aiprod_trainer.evaluation.scores import ATTRIBUTES
from aiprod_trainer.world.judge import agreement, judge
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import Scene, sample_scene

OF_THE_PICTURE = tuple(name for name in ATTRIBUTES if name not in ("sound", "ambience"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipeline", default="two-stages", choices=("two-stages", "distilled"))
    parser.add_argument("--count", type=int, default=32, help="prompts")
    parser.add_argument("--world", default="v1")
    parser.add_argument("--renders", type=int, default=64, help="true scenes to choose from")
    parser.add_argument("--steps", type=int, help="of a guided first stage; default: the model's")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", help="of the second; default: the model's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline = find_pipeline(options.pipeline).from_model(options.model)
    settings: dict[str, Any] = {"stage_2_sigmas": tuple(options.sigmas) if options.sigmas else None}
    if not pipeline.is_distilled:
        settings["num_inference_steps"] = options.steps
    resolved = pipeline.resolve(GenerationRequest("a clip", **settings))
    shape = resolved.shape
    half = {"height": shape.height // 2, "width": shape.width // 2, "skip_stage_2": True}
    rows = []
    for number, prompt in enumerate(world_prompts(options.count, options.world, options.seed)):
        seed = options.seed + number
        large = pipeline(prompt.text, seed=seed, **settings)
        small = pipeline(prompt.text, seed=seed, **settings, **half)
        rows.append(compare(small, large, prompt, options))
        print(f"{number + 1}: {rows[-1]}", file=sys.stderr, flush=True)
    result = {
        "model": options.model,
        "pipeline": options.pipeline,
        "prompts": len(rows),
        "stage_2_sigmas": list(resolved.stage_2_sigmas or ()),
        **{key: summary(rows, key) for key in ("score", "psnr_db", "detail")},
    }
    result["holds"] = result["score"]["mean_gain"] >= 0
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    return 0 if result["holds"] else 1


def compare(
    small: Clip, large: Clip, prompt: Prompt, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Figures of the enlarged first stage and of the second, in this order."""
    assert prompt.scene is not None
    first = np.concatenate([chunk.numpy() for chunk in small.frames()])
    second = np.concatenate([chunk.numpy() for chunk in large.frames()])
    height, width = second.shape[1:3]
    enlarged = np.concatenate(list(media.enlarge([first], height=height, width=width)))
    sound = (
        media.Audio(np.zeros((2, 16000), np.float32), 16000) if large.audio is None else large.audio
    )
    truth = render(nearest_scene(first, sound, prompt.scene, options), height)
    row: dict[str, list[float]] = {"score": [], "psnr_db": [], "detail": []}
    stated = [name for name in OF_THE_PICTURE if name in prompt.stated]
    fps = large.request.shape.fps
    for frames in (enlarged, second):
        verdict = judge(frames, sound.samples, sound.sample_rate, fps)
        agrees = agreement(verdict, prompt.scene)
        row["score"].append(float(np.mean([agrees[name] for name in stated])) if stated else 0.0)
        row["psnr_db"].append(round(psnr(frames, truth[: len(frames)]), 3))
        row["detail"].append(round(sharpness(frames) / sharpness(truth), 3))
    return row


def nearest_scene(
    frames: np.ndarray, sound: media.Audio, asked: Scene, options: argparse.Namespace
) -> Scene:
    """Of scenes as the judge sees this clip, that whose render it resembles most."""
    seen = judge(frames, sound.samples, sound.sample_rate, asked.fps)
    words = {"colour": seen.colour, "shape": seen.shape, "size": seen.size,
             "background": seen.background, "camera": seen.camera,
             "motion": seen.motion if seen.motion != "still" else asked.body.motion}  # fmt: skip
    rng = np.random.default_rng(options.seed)
    scenes = [asked]
    for _ in range(options.renders):
        try:
            scenes.append(sample_scene(rng, world=options.world, **words))
        except InputError:  # the world has no such scene, such as a grey ball on a grey wall
            scenes.append(sample_scene(rng, world=options.world))
    size = frames.shape[1]
    return max(scenes, key=lambda scene: psnr(frames, render(scene, size)[: len(frames)]))


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    error = np.square(frames.astype(np.float32) - truth.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def sharpness(frames: np.ndarray) -> float:
    grey = [cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in frames]
    return float(np.mean([np.abs(cv2.Laplacian(g, cv2.CV_32F)).mean() for g in grey]))


def summary(rows: list[dict[str, list[float]]], key: str) -> dict[str, Any]:
    """Means of both and of the second's gain, with its 95 % interval."""
    first, second = (np.array([row[key][index] for row in rows]) for index in (0, 1))
    gain = second - first
    draws = np.random.default_rng(0).choice(gain, (10_000, len(gain))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {
        "enlarged_first_stage": round(float(first.mean()), 4),
        "second_stage": round(float(second.mean()), 4),
        "mean_gain": round(float(gain.mean()), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
