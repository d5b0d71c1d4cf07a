"""How much faster the tiny decoder is than the full one, and how near its pictures come.

    python benchmarks/tiny_decoder.py --model nano --clips 24 --json tiny_decoder.json

True clips of the world are encoded; both decoders decode each latent in turn, as a pipeline does
(bytes out, kernels and all), and the median of the paired ratios is reported. CPU time counts, not
the clock's, so that other work on the machine matters little; `threads` says how many it had. PSNR
(peak 255, mean over clips) is that to the full decoder's frames and that of each to the true ones.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from rich.progress import track

from aiprod_pipelines import decoding, encoding
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene

GOAL = 4.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help="with its tiny decoder beside it")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    models, quiet = ModelSet.open(options.model), Progress()
    rng = np.random.default_rng([options.seed, 11])
    ratios, seconds = [], {"full": [], "tiny": []}
    psnr: dict[str, list[float]] = {"tiny_to_full": [], "full_to_true": [], "tiny_to_true": []}
    world = str(models.checkpoint.metadata.get("world", "v1"))
    for number in track(range(options.clips + 1), "clips"):
        truth = render(sample_scene(rng, world=world), models.profile.height)
        latent = encoding.encode_frames(models, truth, quiet)
        frames, took = {}, {}
        for name in ("full", "tiny"):
            started = time.process_time()
            chunks = list(decoding.decode_video(models, latent, quiet, is_tiny=name == "tiny"))
            took[name] = time.process_time() - started
            frames[name] = torch.cat(chunks).numpy()
        if number == 0:  # loads both
            continue
        truth = truth[: len(frames["full"])]
        ratios.append(took["full"] / took["tiny"])
        psnr["tiny_to_full"].append(decibels(frames["tiny"], frames["full"]))
        for name in seconds:
            seconds[name].append(took[name])
            psnr[f"{name}_to_true"].append(decibels(frames[name], truth))
    result = {
        "model": models.name,
        "clips": options.clips,
        "threads": torch.get_num_threads(),
        "ratio": round(median(ratios), 2),
        "milliseconds": {name: round(1000 * median(s), 1) for name, s in seconds.items()},
        "psnr_db": {name: round(mean(values), 2) for name, values in psnr.items()},
        "goal": GOAL,
    }
    result["reached"] = result["ratio"] >= GOAL
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0 if result["reached"] else 1


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


if __name__ == "__main__":
    sys.exit(main())
