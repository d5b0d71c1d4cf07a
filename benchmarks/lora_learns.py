"""Does a LoRA teach nano a colour that it has never seen, without forgetting the others?

    python benchmarks/lora_learns.py --json lora_learns.json

The world gets an eleventh colour, brown, which the base was never shown. The LoRA is trained on
clips with brown things, and on as many ordinary ones. Prompts that name the colour are scored
before and after by the nearest of all eleven colours, prompts of the ordinary world by every
attribute that they state; prompts, seeds and noise are the same before and after.

A transformer's LoRA can teach no more than the video codec shows: `target_accuracy_codec` is the
share of true brown clips that are seen as brown after the codec. (A colour that the codec loses
cannot be taught: docs/log.md, nano's third training.)

`target_accuracy_before` and `_after` are shares in [0, 1], `other_change_points` is the change of
the ordinary attributes' mean accuracy in percentage points, `minutes` the training's time.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml

from aiprod_pipelines import decoding, encoding
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline
from aiprod_trainer.evaluation.scores import ATTRIBUTES
from aiprod_trainer.prepare_world import prepare
from aiprod_trainer.train import train
from aiprod_trainer.training_config import read_training_config
from aiprod_trainer.world.captions import WORDS, Caption, describe
from aiprod_trainer.world.judge import agreement, judge
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import COLOURS, Scene, sample_scene, visible_colours
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise

COLOUR, RGB = "brown", (120, 66, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--config", type=Path, default=Path("configs/nano/lora.yaml"))
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a training setting")
    parser.add_argument("--clips", type=int, default=256, help="of the new colour, and ordinary")
    parser.add_argument("--prompts", type=int, default=64, help="of either kind")
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--world", default="v1")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--keep", type=Path, help="folder for data, LoRA and logs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        # The ordinary prompts are drawn before the world knows the colour.
        ordinary = draw_prompts(options, options.prompts, colour=None)
        checkpoint = ModelSet.open(options.model).checkpoint.paths[0]
        size = {"clips": options.clips, "world": options.world, "seed": options.seed + 1}
        prepare(checkpoint, folder / "ordinary", **size)
        COLOURS[COLOUR] = RGB
        WORDS["colour"][COLOUR] = (COLOUR,)
        visible_colours.cache_clear()
        targets = draw_prompts(options, options.prompts, colour=COLOUR)
        prepare(checkpoint, folder / "new", **size, only={"colour": COLOUR})
        join_parts([folder / "ordinary", folder / "new"], folder / "data")

        through_codec = codec_ceiling(options, targets)
        before = score(options, targets, ordinary, loras=())
        started = time.monotonic()
        config = training_config(options, folder)
        last = train(config)
        minutes = (time.monotonic() - started) / 60
        after = score(options, targets, ordinary, loras=(last / "lora.safetensors",))
    return {
        "target_accuracy_codec": through_codec,
        "target_accuracy_before": before["target"],
        "target_accuracy_after": after["target"],
        "other_change_points": round(100 * (after["other"] - before["other"]), 2),
        "minutes": round(minutes, 2),
        "before": before,
        "after": after,
        "steps": config.optimization.steps,
        "rank": config.lora.rank,
        "prompts": options.prompts,
        "model": options.model,
    }


def draw_prompts(
    options: argparse.Namespace, count: int, *, colour: str | None
) -> list[tuple[Scene, Caption]]:
    """Scenes with captions; with a colour, captions that name it."""
    rng = np.random.default_rng([options.seed, 0 if colour is None else 1])
    drawn: list[tuple[Scene, Caption]] = []
    while len(drawn) < count:
        scene = sample_scene(rng, world=options.world, colour=colour)
        caption = describe(scene, rng)
        if colour is None or "colour" in caption.stated:
            drawn.append((scene, caption))
    return drawn


def join_parts(folders: list[Path], out: Path) -> None:
    """One data set of all folders' parts, numbered anew."""
    out.mkdir(parents=True, exist_ok=True)
    files = [file for folder in folders for file in sorted(folder.glob("part-*.safetensors"))]
    for number, file in enumerate(files):
        for suffix in (".safetensors", ".jsonl"):
            shutil.copy(file.with_suffix(suffix), out / f"part-{number:05d}{suffix}")


def training_config(options: argparse.Namespace, folder: Path):
    settings = yaml.safe_load(options.config.read_text())
    settings["model"]["model_path"] = options.model
    settings["data"]["preprocessed_data_root"] = str(folder / "data")
    settings["output_dir"] = str(folder / "run")
    settings["validation"] = {"interval": None, "prompts": []}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return read_training_config(path, options.set)


@torch.inference_mode()
def codec_ceiling(
    options: argparse.Namespace, targets: list[tuple[Scene, Caption]], count: int = 16
) -> float:
    """The share of the prompts' true clips that the judge sees rightly after the video codec."""
    models = ModelSet.open(options.model)
    profile = models.profile
    seen = []
    for scene, _ in targets[:count]:
        frames = render(scene, profile.height)
        quiet = Progress()
        latent = encoding.encode_frames(models, frames, quiet)
        decoded = torch.cat(list(decoding.decode_video(models, latent, quiet))).numpy()
        seen.append(judge(decoded, synthesise(scene), SAMPLE_RATE, scene.fps).colour)
    return round(mean(colour == COLOUR for colour in seen), 4)


def score(
    options: argparse.Namespace,
    targets: list[tuple[Scene, Caption]],
    ordinary: list[tuple[Scene, Caption]],
    loras: tuple[Path, ...],
) -> dict[str, Any]:
    pipeline = TI2VidOneStagePipeline.from_model(options.model)
    steps = options.num_inference_steps

    def verdict_of(prompt: str, seed: int):
        clip = pipeline(prompt, seed=seed, num_inference_steps=steps, loras=loras)
        assert clip.audio is not None
        frames = torch.cat(list(clip.frames())).numpy()
        rate, fps = clip.audio.sample_rate, clip.request.shape.fps
        return judge(frames, clip.audio.samples, rate, fps)

    seen = [verdict_of(caption.text, n).colour for n, (_, caption) in enumerate(targets)]
    right: dict[str, list[bool]] = {}
    for number, (scene, caption) in enumerate(ordinary):
        agrees = agreement(verdict_of(caption.text, 10_000 + number), scene)
        for name in caption.stated & set(ATTRIBUTES):
            right.setdefault(name, []).append(bool(agrees[name]))
    shares = {name: round(mean(values), 4) for name, values in sorted(right.items())}
    return {
        "target": round(mean(colour == COLOUR for colour in seen), 4),
        "other": round(mean(value for values in right.values() for value in values), 4),
        "others": shares,
        "target_seen_as": {name: seen.count(name) for name in sorted(set(seen))},
    }


if __name__ == "__main__":
    main()
