"""What distilling costs and gains: scores, diversity and time of a student against its teacher.

    python benchmarks/distillation.py --model nano --prompts 96 --json distillation.json

The teacher runs in 40 guided steps, the student in 8 (or `--steps 4`) without guidance, as a model
and as a LoRA on the teacher; what of these lies beside the model is measured, or `--student` and
`--lora` name them. Where there is a LoRA alone, it is the student. `distilled_share` is
`aiprod eval`'s: the mean of its shares over the teacher's.

`diversity` is the mean distance between clips of one prompt with different seeds, over the
teacher's. A clip's feature is what remains of it from afar: every third frame brought to 8 x 8
pixels, and the log-mel spectrogram averaged over 4 bands and 8 columns; the distance is the root
mean square, and the ratios of picture and sound are averaged.

`speedup` is the median ratio of denoising times, teacher and student run in turn; that of whole
clips, decoded and all, is given beside it.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from aiprod_core.model.mel import log_mel
from aiprod_pipelines import companions, media
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.distilled import DistilledPipeline
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline
from aiprod_trainer.evaluation.clips import make_clips
from aiprod_trainer.evaluation.prompts import Prompt, world_prompts
from aiprod_trainer.evaluation.scores import distilled_share, judge_clip, score_rows

GOALS = {"distilled_share": 0.90, "diversity": 0.85, "speedup": 5.0, "lora_share": 0.85}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help="the teacher")
    parser.add_argument("--student", type=Path, help="default: NAME-distilled beside it")
    parser.add_argument("--lora", type=Path, help="default: NAME-distilled-lora-* beside it")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--diversity-prompts", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4, help="of each prompt, for the diversity")
    parser.add_argument("--timed", type=int, default=4, help="clips of each side that are timed")
    parser.add_argument("--teacher-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8, choices=(8, 4), help="the student's")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--clips", type=Path, help="where clips are kept; a stopped run goes on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    sides = open_sides(options)
    world = str(sides["teacher"][0].models.checkpoint.metadata.get("world", "v1"))
    prompts = world_prompts(options.prompts, world, options.seed)
    is_lora_alone = sides.get("lora") is sides.get("student")
    different = {k: v for k, v in sides.items() if k != "student" or not is_lora_alone}
    with TemporaryDirectory() as temporary:
        folder = options.clips or Path(temporary)
        scores = {
            name: score(pipeline, settings, prompts, folder / name, options.seed)
            for name, (pipeline, settings) in different.items()
        }
    spread = {
        name: diversity(*side, prompts[: options.diversity_prompts], options.seeds)
        for name, side in different.items()
    }
    if is_lora_alone:
        scores["student"], spread["student"] = scores["lora"], spread["lora"]
    result: dict[str, Any] = {
        "model": options.model,
        "prompts": options.prompts,
        "steps": {"teacher": options.teacher_steps, "student": options.steps},
        "threads": torch.get_num_threads(),
        "is_lora_alone": is_lora_alone,
        "goals": GOALS,
        "scores": scores,
    }
    if "student" in sides:
        result["distilled_share"] = distilled_share(scores["teacher"], scores["student"])
        result |= {"diversity": ratio(spread["student"], spread["teacher"])}
        result |= speedup(sides["teacher"], sides["student"], prompts[: options.timed])
    if "lora" in sides:
        result["lora_share"] = distilled_share(scores["teacher"], scores["lora"])
        result["lora_diversity"] = ratio(spread["lora"], spread["teacher"])
    result["reached"] = {
        name: (result.get(name) or 0) >= goal for name, goal in GOALS.items() if name in result
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0 if len(result["reached"]) == len(GOALS) and all(result["reached"].values()) else 1


Side = tuple[Pipeline, dict[str, Any]]  # and the settings of its requests


def open_sides(options: argparse.Namespace) -> dict[str, Side]:
    teacher = TI2VidOneStagePipeline(ModelSet.open(options.model))
    sides: dict[str, Side] = {"teacher": (teacher, {"num_inference_steps": options.teacher_steps})}
    settings = {"skip_stage_2": True, "num_inference_steps": options.steps}
    checkpoint = teacher.models.checkpoint
    lora = options.lora or companions.find_beside(checkpoint, "distilled-lora")
    student = options.student or checkpoint.paths[0].with_name(
        f"{companions.model_name(checkpoint)}-distilled.safetensors"
    )
    if student.is_file():
        text_encoder = teacher.models.text_encoder_source
        opened = ModelSet.open(student, text_encoder=text_encoder)
        sides["student"] = (DistilledPipeline(opened), settings)
    if lora is not None:
        sides["lora"] = (
            DistilledPipeline(teacher.models),
            settings | {"distilled_lora": {"path": str(lora)}},
        )
    if "lora" in sides:
        sides.setdefault("student", sides["lora"])  # a model may come with its LoRA alone
    if len(sides) == 1:
        print(f"error: {student.name} and its LoRA are not there; make them with aiprod distill.")
        sys.exit(2)
    return sides


def score(
    pipeline: Pipeline, settings: dict[str, Any], prompts: list[Prompt], folder: Path, seed: int
) -> dict[str, float | None]:
    paths = make_clips(pipeline, prompts, folder, seed=seed, settings=settings)
    pairs = list(zip(paths, prompts, strict=True))
    return score_rows([judge_clip(*pair) for pair in track(pairs, f"judging {folder.name}")])


def diversity(
    pipeline: Pipeline, settings: dict[str, Any], prompts: list[Prompt], seeds: int
) -> dict[str, float]:
    """Mean distance between clips of one prompt, of picture and of sound."""
    found: dict[str, list[float]] = {"video": [], "audio": []}
    for prompt in track(prompts, "diversity"):
        clips = [feature(pipeline(prompt.text, seed=s, **settings)) for s in range(seeds)]
        for a, b in combinations(clips, 2):
            for name in found:
                found[name].append(float((a[name] - b[name]).square().mean().sqrt()))
    return {name: mean(values) for name, values in found.items()}


def feature(clip: Clip) -> dict[str, Tensor]:
    """The clip from afar: 8 x 8 thumbnails in [0, 1], and a coarse log-mel spectrogram."""
    frames = torch.cat(list(clip.frames()))[::3].permute(0, 3, 1, 2).float() / 255
    assert clip.audio is not None
    config = clip.models.audio_config
    sound = media.resample(clip.audio, config.sampling_rate, channels=2)
    mel = log_mel(torch.from_numpy(sound.samples)[None], config)  # (1, 2, columns, bins)
    return {"video": F.adaptive_avg_pool2d(frames, 8), "audio": F.avg_pool2d(mel, (8, 4))}


def ratio(student: dict[str, float], teacher: dict[str, float]) -> float:
    return round(mean(student[name] / teacher[name] for name in teacher), 4)


def speedup(teacher: Side, student: Side, prompts: list[Prompt]) -> dict[str, float]:
    denoise, whole = [], []
    for seed, prompt in enumerate(prompts):
        seconds = []
        for pipeline, settings in (teacher, student):
            clip = pipeline(prompt.text, seed=seed, **settings)
            list(clip.frames())
            assert clip.audio is not None
            seconds.append(clip.progress.seconds)
        denoise.append(seconds[0]["denoise"] / seconds[1]["denoise"])
        whole.append(sum(seconds[0].values()) / sum(seconds[1].values()))
    return {
        "speedup": round(median(denoise), 2),
        "speedup_of_whole_clips": round(median(whole), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
