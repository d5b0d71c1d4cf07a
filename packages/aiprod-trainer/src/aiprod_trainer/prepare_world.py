"""Encodes clips of the procedural world once, so that the transformer trains on latents.

    python -m aiprod_trainer.prepare_world --checkpoint runs/codecs.safetensors \\
        --out runs/latents --clips 6000 --captions 2 --seed 1

Writes `part-00000.safetensors`, ... of 256 clips each: video and audio latents (float16), the
text encoder's hidden states of each caption with padding removed, and beside each a JSON-lines
file with captions. A part is a function of (seed, its number): run again, only what is missing is
made, and `--part-range` lets two processes share the work.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import (
    load_audio_encoder,
    load_text_encoder,
    load_video_encoder,
)
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.mel import log_mel
from aiprod_trainer.world.captions import caption
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import synthesise

CLIPS_PER_PART = 256


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="file with both codecs")
    parser.add_argument("--text-encoder", type=Path, help="folder of the text encoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=6144)
    parser.add_argument("--captions", type=int, default=2, help="captions for each clip")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--world", default="v1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part-range", default="0:", help="parts to make, e.g. 0:12 and 12:24")
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def prepare(arguments: argparse.Namespace) -> None:
    """Makes every missing part of the range. Raises InputError for a file that cannot be used."""
    checkpoint = open_checkpoint(arguments.checkpoint)
    video_encoder = load_video_encoder(checkpoint, dtype=torch.float32)
    audio_encoder = load_audio_encoder(checkpoint, dtype=torch.float32)
    front_end = AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
    text_encoder = load_text_encoder(checkpoint, arguments.text_encoder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    first, _, last = arguments.part_range.partition(":")
    parts = range(-(-arguments.clips // CLIPS_PER_PART))[slice(int(first), int(last or 10**9))]
    for part in track(parts, description="parts of 256 clips"):
        path = arguments.out / f"part-{part:05d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng([arguments.seed, part])
        count = min(CLIPS_PER_PART, arguments.clips - part * CLIPS_PER_PART)
        scenes = [sample_scene(rng, world=arguments.world) for _ in range(count)]
        captions = [[caption(scene, rng) for _ in range(arguments.captions)] for scene in scenes]
        tensors = {"video": [], "audio": [], "hidden": [], "lengths": []}
        for start in range(0, count, 16):
            batch = scenes[start : start + 16]
            frames = np.stack([render(scene, arguments.size) for scene in batch])
            pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            mel = log_mel(torch.from_numpy(np.stack([synthesise(s) for s in batch])), front_end)
            tensors["video"].append(video_encoder(pixels).half())
            tensors["audio"].append(audio_encoder(mel[:, :, : mel.shape[2] // 4 * 4]).half())
            texts = [text for group in captions[start : start + 16] for text in group]
            hidden, mask = text_encoder.encode(texts)
            tensors["hidden"].append(hidden[mask.bool()].half())  # (tokens, D, L)
            tensors["lengths"].append(mask.sum(dim=1).int())
        temporary = path.with_suffix(".tmp")
        save_file({k: torch.cat(v).contiguous() for k, v in tensors.items()}, temporary)
        path.with_suffix(".jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
        temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
