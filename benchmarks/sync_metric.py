"""How exactly planted offsets between sound and picture are recovered on the world's true clips.

    python benchmarks/sync_metric.py --json sync_metric.json

The sound of each clip is moved by a random offset of -400 to +400 ms and cut to the clip's length.
`mean_error_ms` is over the events that the world's judge sees and hears; `any_clip` is
`metrics.sync.av_offset`, which knows nothing of the world, on its impacts. Walking is left out: its
steps are 480 ms apart, so an offset of +400 ms is one of -80 ms.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, median

import numpy as np
from rich.progress import track

from aiprod_pipelines.media import Audio
from aiprod_pipelines.metrics.sync import Offset, av_offset
from aiprod_trainer.world.judge import judge, sync_offset
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise

GOAL_MS = 25
WORLDS = {
    "v1": ("bounce", "fall", "pulse"),
    "v2": ("bounce", "fall", "pulse", "pendulum", "collide"),
}
IMPACTS = ("bounce", "fall", "collide")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="clips a world and motion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    rng = np.random.default_rng(options.seed)
    jobs = [(w, m) for w, motions in WORLDS.items() for m in motions for _ in range(options.count)]
    known: dict[str, list[float]] = {}
    unknown: dict[str, list[float]] = {}
    missed = {"known": 0, "any_clip": 0}

    def add(to: dict[str, list[float]], name: str, motion: str, found: Offset | None) -> None:
        if found is None:
            missed[name] += 1
        else:
            to.setdefault(motion, []).append(abs(found.ms - 1000 * offset_s))

    for world, motion in track(jobs, description="clips", transient=True):
        scene = sample_scene(rng, world=world, motion=motion)
        offset_s = rng.uniform(-0.4, 0.4)
        frames = render(scene, options.size)
        audio = moved(synthesise(scene), offset_s)
        verdict = judge(frames, audio, SAMPLE_RATE, scene.fps)
        last_frame_s = (scene.num_frames - 1) / scene.fps
        add(known, "known", motion, sync_offset(verdict, last_frame_s, scene.duration_s))
        if motion in IMPACTS:
            heard = Audio(audio, SAMPLE_RATE)
            add(unknown, "any_clip", motion, av_offset(frames, scene.fps, heard))
    result = {
        "count": len(jobs),
        "range_ms": [-400, 400],
        **summary(known, missed["known"]),
        "any_clip": summary(unknown, missed["any_clip"]),
        "goal_ms": GOAL_MS,
    }
    result["reached"] = result["mean_error_ms"] <= GOAL_MS
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0 if result["reached"] else 1


def moved(samples: np.ndarray, offset_s: float) -> np.ndarray:
    """The sound, late by `offset_s` seconds (early if negative), with silence where it left."""
    shift = round(offset_s * SAMPLE_RATE)
    out = np.zeros_like(samples)
    if shift >= 0:
        out[:, shift:] = samples[:, : samples.shape[1] - shift]
    else:
        out[:, :shift] = samples[:, -shift:]
    return out


def summary(errors: dict[str, list[float]], missed: int) -> dict:
    every = [error for values in errors.values() for error in values]
    return {
        "mean_error_ms": round(mean(every), 2),
        "median_error_ms": round(median(every), 2),
        "by_motion_ms": {motion: round(mean(values), 2) for motion, values in errors.items()},
        "without_offset": missed,
    }


if __name__ == "__main__":
    sys.exit(main())
