"""What a latent upscaler gains over resizing: PSNR in dB to the true larger clip, held out.

    python benchmarks/upscalers.py --model nano --count 32 --json upscalers.json

Each scene of the world that no training drew is rendered at the model's size and as the upscaler
shall make it: twice as large, or with twice the frames. `psnr` is that of the upscaled latents
decoded, `resized_psnr` that of the decoded small clip resized (bicubic; in time linear blending),
`codec_psnr` that of the large clip through the codec alone, which nothing here can pass. The gain
is given with a 95 % bootstrap interval over the clips. Upscalers that are not beside the model are
named and skipped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_upsampler, load_video_decoder, load_video_encoder
from aiprod_pipelines import companions
from aiprod_pipelines.components import ModelSet
from aiprod_trainer.train_upsampler import UpsamplerTrainingConfig, clips, evaluate

KINDS = ("spatial", "temporal")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--count", type=int, default=32, help="clips")
    parser.add_argument("--world", default="v1")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = ModelSet.open(options.model, device="cpu")
    result: dict[str, Any] = {"model": options.model, "clips": options.count, "skipped": []}
    for kind in KINDS:
        path = companions.find_beside(models.checkpoint, f"{kind}-upscaler-x2")
        if path is None:
            result["skipped"].append(f"{kind}: no {kind}-upscaler-x2 beside {models.name}")
        else:
            result[kind] = measure(models, path, options)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


@torch.inference_mode()
def measure(models: ModelSet, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    upsampler = load_upsampler(checkpoint, dtype=torch.float32)
    encoder = load_video_encoder(models.checkpoint, dtype=torch.float32)
    decoder = load_video_decoder(models.checkpoint, dtype=torch.float32)
    config = UpsamplerTrainingConfig(
        upsampler=checkpoint.config,
        codecs=models.checkpoint.paths[0],
        world=options.world,
        size=models.profile.height,
        num_frames=models.profile.num_frames,
    )
    rng = np.random.default_rng([options.seed, 13])  # no training draws from such a pair
    rows = [
        evaluate(upsampler, encoder, decoder, clips(config, rng, 1, config.num_frames), config)
        for _ in range(options.count)
    ]
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    gains = np.array([row["psnr"] - row["resized_psnr"] for row in rows])
    draws = np.random.default_rng(0).choice(gains, (10_000, len(gains))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {
        **{key: round(value, 3) for key, value in means.items()},
        "gain_db": round(float(gains.mean()), 3),
        "interval_95": [round(float(low), 3), round(float(high), 3)],
    }


if __name__ == "__main__":
    main()
