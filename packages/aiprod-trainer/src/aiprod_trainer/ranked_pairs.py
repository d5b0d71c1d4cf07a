"""`aiprod reward pairs`: a data set for Flow-DPO, of a model's own clips.

Several seeds of each prompt are generated and ranked, by the reward model beside the model or by
the world's judge; the best and the worst are a pair. The layout is data.py's, with `rejected_video`
and `rejected_audio` beside what was preferred.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_pipelines import companions
from aiprod_pipelines.components import ModelSet
from aiprod_trainer.evaluation.prompts import Prompt
from aiprod_trainer.preferences import Sampled, encode_texts, grids_of, sample_clips
from aiprod_trainer.reward import Grids, judged_clip, summed_scores
from aiprod_trainer.world.captions import describe
from aiprod_trainer.world.scene import sample_scene

PROMPTS_PER_PART = 16
IN_SYNC_MS = 40.0

Ranking = Literal["reward", "judge"]


def prepare_ranked_pairs(
    models: ModelSet,
    folder: Path,
    *,
    prompts: int,
    seeds: int = 4,  # clips of each prompt
    by: Ranking = "reward",
    world: str = "v1",
    seed: int = 1,
    reward: Path | None = None,  # default: the reward model beside the model
    settings: dict[str, Any] | None = None,  # fields of the requests
) -> None:
    """Makes every missing part of 16 prompts; a part is a function of (seed, its number).

    Prompts whose clips are all equally good give no pair. Raises InputError without a reward model
    where one is to rank.
    """
    if seeds < 2:
        raise InputError(f"--seeds must be at least 2, or nothing can be ranked; got {seeds}.")
    path = companions.reward_model(models.checkpoint, reward) if by == "reward" else None
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        empty, mask = _hidden_states(models, [""])
    save_file({"hidden": empty[mask]}, folder / "empty.safetensors")
    for number in track(range(-(-prompts // PROMPTS_PER_PART)), description="pairs"):
        part = folder / f"part-{number:05d}.safetensors"
        if part.exists():
            continue
        rng = np.random.default_rng([seed, number])
        count = min(PROMPTS_PER_PART, prompts - number * PROMPTS_PER_PART)
        asked = []
        for _ in range(count):
            scene = sample_scene(rng, world=world)
            caption = describe(scene, rng)
            asked.append(Prompt(caption.text, scene, caption.stated))
        texts = [prompt.text for prompt in asked for _ in range(seeds)]
        numbers = [int(s) for s in rng.integers(2**31, size=len(texts))]
        sampled = sample_clips(models, texts, numbers, settings=settings)
        if path is not None:
            scores = reward_scores(models, path, sampled, texts)
        else:
            scores = judge_scores(models, asked, sampled, seeds)
        scores = scores.view(count, seeds)
        chosen = [k for k in range(count) if scores[k].max() > scores[k].min()]
        rows = torch.tensor(chosen) * seeds
        best, worst = rows + scores[chosen].argmax(1), rows + scores[chosen].argmin(1)
        with torch.inference_mode():
            hidden, mask = _hidden_states(models, [asked[k].text for k in chosen])
        clips = sampled.finished
        assert clips.video is not None and clips.audio is not None
        tensors = {
            "video": clips.video[best],
            "audio": clips.audio[best],
            "rejected_video": clips.video[worst],
            "rejected_audio": clips.audio[worst],
            "hidden": hidden[mask],  # (tokens, D, L)
            "lengths": mask.sum(dim=1).int(),
        }
        captions = "".join(json.dumps([asked[k].text]) + "\n" for k in chosen)
        part.with_suffix(".jsonl").write_text(captions)
        temporary = part.with_suffix(".tmp")
        metadata = {"fps": f"{models.profile.frame_rate:g}"}
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)
        temporary.replace(part)


@torch.inference_mode()
def reward_scores(
    models: ModelSet, reward: Path, sampled: Sampled, texts: list[str], sigma: float = 0.0
) -> Tensor:
    """(K,) the sum of all axes for each finished clip."""
    clips = sampled.finished
    assert clips.video is not None and clips.audio is not None
    grids = Grids.of(grids_of(models, clips.video[0], clips.audio[0], models.profile.frame_rate))
    text, mask = encode_texts(models, texts)
    with models.reward(reward) as network:
        return summed_scores(network, clips, text, mask, grids, sigma)


def judge_scores(models: ModelSet, prompts: list[Prompt], sampled: Sampled, seeds: int) -> Tensor:
    """(K,) the share right of what a prompt states; keeping time counts as one attribute more."""
    scores = []
    for number, prompt in enumerate(prompts):
        for k in range(seeds):
            right, sync = judged_clip(models, prompt, sampled, number * seeds + k)
            values = [value for value in (right, _in_sync(sync)) if np.isfinite(value)]
            scores.append(sum(values) / max(1, len(values)))
    return torch.tensor(scores)


def _in_sync(sync: float) -> float:
    """1 within 40 ms, falling to 0 at 400; NaN where the prompt asks for no events."""
    return float(np.interp(-sync, (IN_SYNC_MS, 400.0), (1.0, 0.0))) if np.isfinite(sync) else sync


def _hidden_states(models: ModelSet, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(K, S, D, L) in float16 and the mask (K, S)."""
    with models.text_encoder() as encoder:
        hidden, mask = encoder.encode(texts)
    return hidden.half().cpu(), mask.bool().cpu()
