"""Scores a nano checkpoint: prompts it never saw, clips judged against the scene they describe.

    python -m aiprod_trainer.scoreboard --model nano --prompts 128 --json scores.json \\
        --sheets outputs/sheets

An attribute is scored only where the prompt states it. Half of the prompts use synonyms that the
training captions never do. `sync_ms` compares seen and heard events; its baseline pairs each clip's
picture with the next clip's sound. Sound and picture are judged from the decoded clip, as a viewer
gets it.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.progress import track

from aiprod_core.errors import InputError
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline
from aiprod_trainer.world.captions import describe
from aiprod_trainer.world.contact_sheet import contact_sheet, write_png
from aiprod_trainer.world.judge import Verdict, agreement, judge, sync_error_ms
from aiprod_trainer.world.scene import sample_scene

ATTRIBUTES = ("colour", "shape", "size", "motion", "background", "sound", "camera")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own when absent")
    parser.add_argument("--world", default="v1")
    parser.add_argument("--seed", type=int, default=2026, help="of prompts and clips")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--sheets", type=Path, help="write a contact sheet of each clip here")
    arguments = parser.parse_args(argv)
    try:
        scores = score(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in scores.items():
        print(f"{name:24} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=1))
    return 0


def score(arguments: argparse.Namespace) -> dict[str, float]:
    """Shares right in [0, 1] and milliseconds; "_n" keys count what a share is over."""
    pipeline = TI2VidOneStagePipeline.from_model(arguments.model)
    rng = np.random.default_rng([arguments.seed, 7])
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    synonyms: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    verdicts: list[Verdict] = []
    for number in track(range(arguments.prompts), description="clips"):
        scene = sample_scene(rng, world=arguments.world)
        is_held_out = number % 2 == 1
        prompt = describe(scene, rng, "held_out" if is_held_out else "train")
        clip = pipeline(
            prompt.text, seed=arguments.seed + number, num_inference_steps=arguments.steps
        )
        frames = torch.cat(list(clip.frames())).numpy()
        assert clip.audio is not None
        rate, fps = clip.audio.sample_rate, clip.request.shape.fps
        verdict = judge(frames, clip.audio.samples, rate, fps)
        verdicts.append(verdict)
        agrees = agreement(verdict, scene)
        for name in prompt.stated & set(ATTRIBUTES):
            right[name].append(bool(agrees[name]))
            if is_held_out:
                synonyms[name].append(bool(agrees[name]))
        if arguments.sheets:
            wrong = [name for name in ATTRIBUTES if name in prompt.stated and not agrees[name]]
            title = f"{prompt.text}   wrong: {', '.join(wrong) or 'nothing'}"
            sheet = contact_sheet(
                frames,
                clip.audio.samples,
                title=title,
                sample_rate=rate,
                fps=fps,
                seen_s=verdict.seen_s,
                heard_s=verdict.heard_s,
            )
            arguments.sheets.mkdir(parents=True, exist_ok=True)
            write_png(arguments.sheets / f"{number:03d}.png", sheet)
    scores: dict[str, float] = {}
    for suffix, table in (("", right), ("_synonyms", synonyms)):
        for name, values in table.items():
            if values:
                scores[name + suffix] = round(sum(values) / len(values), 4)
                scores[f"{name}{suffix}_n"] = len(values)
    return scores | sync_scores(verdicts, last_s=24 / 12 - 0.05)


def sync_scores(verdicts: list[Verdict], last_s: float) -> dict[str, float]:
    """Median sync error in ms, the same with each clip's sound swapped for the next one's."""
    matched = [v.sync_ms for v in verdicts if v.sync_ms is not None]
    eventful = [v for v in verdicts if v.seen_s and v.heard_s]
    swapped = [
        error
        for seen, heard in zip(eventful, eventful[1:] + eventful[:1], strict=True)
        if (error := sync_error_ms(seen.seen_s, heard.heard_s, last_s)) is not None
    ]
    scores: dict[str, float] = {"sync_n": len(matched)}
    if matched and swapped:
        scores |= {"sync_ms": round(median(matched), 1), "sync_shuffled_ms": median(swapped)}
    return scores


if __name__ == "__main__":
    sys.exit(main())
