"""Encodes clips of the procedural world once, so that the transformer trains on latents.

    python -m aiprod_trainer.prepare_world --checkpoint runs/codecs.safetensors \\
        --out runs/latents --clips 6000 --captions 2 --seed 1

Writes `part-00000.safetensors`, ... of 256 clips each: video and audio latents (float16), the
text encoder's hidden states of each caption with padding removed, and beside each a JSON-lines
file with captions. A part is a function of (seed, its number): run again, only what is missing is
made, and `--part-range` lets two processes share the work. The layout is data.py's.

For a LoRA, `--only camera="dolly in"` keeps an attribute of all scenes; for an IC-LoRA,
`--references canny depth pose detailer` adds what it is shown, as `reference_canny` and so on.
`object_cells` marks the latent cells in which an object is seen (`object_weight` of train_base).
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import (
    load_audio_encoder,
    load_text_encoder,
    load_video_encoder,
)
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.mel import log_mel
from aiprod_pipelines.controls import blur, make_control
from aiprod_trainer.world import ground_truth
from aiprod_trainer.world.captions import caption
from aiprod_trainer.world.render import object_mask, render
from aiprod_trainer.world.scene import Scene, sample_scene
from aiprod_trainer.world.sound import synthesise

CLIPS_PER_PART = 256


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="file with both codecs")
    parser.add_argument("--text-encoder", type=Path, help="folder of the text encoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=6144)
    parser.add_argument("--captions", type=int, default=2, help="captions for each clip")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--world", default="v1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", action="append", metavar="ATTRIBUTE=VALUE", help="of every scene; repeat for more"
    )
    parser.add_argument("--references", nargs="*", choices=REFERENCES, default=[])
    parser.add_argument("--part-range", default="0:", help="parts to make, e.g. 0:12 and 12:24")
    arguments = parser.parse_args(argv)
    try:
        prepare(
            arguments.checkpoint,
            arguments.out,
            text_encoder=arguments.text_encoder,
            clips=arguments.clips,
            captions=arguments.captions,
            size=arguments.size,
            world=arguments.world,
            seed=arguments.seed,
            only=dict(entry.split("=", 1) for entry in arguments.only or ()),
            references=arguments.references,
            part_range=arguments.part_range,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# What an IC-LoRA is shown beside a clip, as frames (F, H, W, 3) of uint8 at the clip's size.
REFERENCES: dict[str, Callable[[Scene, np.ndarray], np.ndarray]] = {
    "canny": lambda scene, frames: make_control("canny", frames),
    "depth": lambda scene, frames: _grey(ground_truth.depth(scene, frames.shape[1])),
    "pose": lambda scene, frames: ground_truth.pose(scene, frames.shape[1]),
    "detailer": lambda scene, frames: blur(frames),
}


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat((values * 255).round().astype(np.uint8)[..., None], 3, axis=-1)


@torch.no_grad()
def prepare(
    codecs: Path,
    out: Path,
    *,
    clips: int,
    captions: int = 2,
    size: int = 64,
    world: str = "v1",
    seed: int = 1,
    text_encoder: Path | None = None,
    only: Mapping[str, str] | None = None,  # attributes of every scene
    references: Sequence[str] = (),
    part_range: str = "0:",
) -> None:
    """Makes every missing part of the range. Raises InputError for what cannot be used."""
    checkpoint = open_checkpoint(codecs)
    video_encoder = load_video_encoder(checkpoint, dtype=torch.float32)
    audio_encoder = load_audio_encoder(checkpoint, dtype=torch.float32)
    front_end = AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
    encoder = load_text_encoder(checkpoint, text_encoder)
    out.mkdir(parents=True, exist_ok=True)
    first, _, last = part_range.partition(":")
    parts = range(-(-clips // CLIPS_PER_PART))[slice(int(first), int(last or 10**9))]
    for part in track(parts, description="parts of 256 clips"):
        path = out / f"part-{part:05d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, part])
        count = min(CLIPS_PER_PART, clips - part * CLIPS_PER_PART)
        scenes = [_scene(rng, world, only or {}) for _ in range(count)]
        texts = [[caption(scene, rng) for _ in range(captions)] for scene in scenes]
        tensors: dict[str, list[Tensor]] = defaultdict(list)
        for start in range(0, count, 16):
            batch = scenes[start : start + 16]
            frames = np.stack([render(scene, size) for scene in batch])
            mel = log_mel(torch.from_numpy(np.stack([synthesise(s) for s in batch])), front_end)
            video = video_encoder(_pixels(frames)).half()
            tensors["video"].append(video)
            masks = torch.from_numpy(np.stack([object_mask(scene, size) for scene in batch]))
            tensors["object_cells"].append(_cells(masks, video.shape[2:]))
            tensors["audio"].append(audio_encoder(mel[:, :, : mel.shape[2] // 4 * 4]).half())
            for name in references:
                shown = [REFERENCES[name](s, f) for s, f in zip(batch, frames, strict=True)]
                latent = video_encoder(_pixels(np.stack(shown)))
                tensors[f"reference_{name}"].append(latent.half())
            own = [text for group in texts[start : start + 16] for text in group]
            hidden, mask = encoder.encode(own)
            tensors["hidden"].append(hidden[mask.bool()].half())  # (tokens, D, L)
            tensors["lengths"].append(mask.sum(dim=1).int())
        temporary = path.with_suffix(".tmp")
        metadata = {"fps": f"{scenes[0].fps:g}"}
        joined = {name: torch.cat(values).contiguous() for name, values in tensors.items()}
        save_file(joined, temporary, metadata=metadata)
        path.with_suffix(".jsonl").write_text("".join(json.dumps(c) + "\n" for c in texts))
        temporary.replace(path)


def _scene(rng: np.random.Generator, world: str, only: Mapping[str, str]) -> Scene:
    try:
        return sample_scene(rng, world=world, **only)
    except TypeError:
        raise InputError(
            f"--only {', '.join(only)}: a scene has shape, colour, size, material, motion, "
            "background, camera and ambience."
        ) from None


def _cells(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """Cover of pixels (B, T, H, W) to uint8 (B, F, h, w): 1 where a latent cell sees any of it.

    A latent's first frame stands for one frame, each further one for as many as there are.
    """
    frames_each = (masks.shape[1] - 1) // max(grid[0] - 1, 1)
    padded = torch.cat([masks[:, :1].expand(-1, frames_each - 1, -1, -1), masks], dim=1)
    return (F.adaptive_max_pool3d(padded, tuple(grid)) > 0.5).to(torch.uint8)


def _pixels(frames: np.ndarray) -> Tensor:
    """(B, F, H, W, 3) of uint8 to (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


if __name__ == "__main__":
    sys.exit(main())
