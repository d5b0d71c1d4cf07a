"""The best of several seeds, chosen before most of their steps are taken.

Where the model's distilled LoRA is beside it, every seed is drafted: made whole in 8 or 4 steps
without guidance. A student of the model's own trajectories makes of a seed nearly the model's clip,
so the reward model judges finished clips, and the winner alone is made in all its steps. Else every
seed is denoised for the first 30 % of the steps, where little of a clip is decided yet, and the
clean estimates are judged; the losers stop, and the winner goes on where it was. Four seeds cost
at most 1.9 clips either way. The clip is, bit for bit, that of its seed alone, so a recipe names
the seed and nothing else.

A sampler cannot be paused, but its callback can wait: at its early step each seed starts the next
one from within the callback. When the last is judged, all of them wait on the stack; each in turn,
the last first, goes on if it has won and is unwound by an exception if it has not.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.components.samplers import Callback
from aiprod_core.errors import InputError
from aiprod_core.model.reward import text_states
from aiprod_core.types import AV
from aiprod_pipelines import companions
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.request import GenerationRequest, LoraFile

Attempt = Callable[[int, Callback], AV]


def early_step(steps: int) -> int:
    """How many of the steps are taken before the verdict: 30 %, rounded down, but one."""
    return max(1, steps * 3 // 10)


class Draft(NamedTuple):
    """How a clip is made in few steps without guidance."""

    lora: LoraFile
    steps: int


def draft_of(
    models: ModelSet, request: GenerationRequest, steps: int, loras: Sequence[LoraFile]
) -> Draft | None:
    """How clips of `steps` steps with these LoRAs are drafted; None where they cannot be, or where
    four drafts would cost more than the early steps of four seeds."""
    affordable = [few for few in (8, 4) if 4 * few <= 0.9 * steps]
    if request.best_of == 1 or not affordable or models.is_distilled or models.offload == "disk":
        return None
    beside = companions.find_beside(models.checkpoint, "distilled-lora")
    lora = request.distilled_lora or (LoraFile(beside) if beside else None)
    if lora is None or lora.path in {other.path for other in loras}:
        return None
    companions.check_lora(models.checkpoint, lora)
    return Draft(lora, affordable[0])


class _LostError(Exception):
    """Stops the sampler of a seed that is not the best."""


def contest(
    attempt: Attempt,  # a seed and its sampler's callback to finished tokens
    seeds: Sequence[int],
    steps: int,
    judge: Callable[[AV, float], float],  # clean tokens and their sigma to a score
) -> tuple[AV, int, list[float]]:
    """The finished tokens of the best seed, that seed, and the early scores of all.

    Of equal scores the first wins.
    """
    scores: list[float] = []
    finished: list[AV] = []

    def start(number: int) -> None:
        def after_step(step: int, sigma: float, x: AV, denoised: AV) -> None:
            if step + 1 != early_step(steps):
                return
            scores.append(judge(denoised, sigma))
            if number + 1 < len(seeds):
                start(number + 1)  # this seed waits here until all others are judged
            if scores.index(max(scores)) != number:
                raise _LostError

        with suppress(_LostError):
            finished.append(attempt(seeds[number], after_step))

    start(0)
    (winner,) = finished
    return winner, seeds[scores.index(max(scores))], scores


@dataclass(frozen=True, eq=False)
class Verdict:
    """Scores a clip's latents against its prompt. Built by `open_verdict`."""

    models: ModelSet
    path: Path
    text: Tensor  # (1, S, D)
    mask: Tensor  # (1, S)

    @torch.inference_mode()
    def __call__(
        self,
        latents: AV,  # video (1, C, F, H, W), audio (1, z, T, bins); one may be None
        sigma: float,  # at which they were estimated; 0 for a finished clip
        video_grid: VideoGrid | None,
        audio_grid: AudioGrid | None,
    ) -> dict[str, float]:
        """A log odds for each axis that can be judged; they add up."""
        device = self.models.device

        def ready(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, torch.float32)

        with self.models.reward(self.path) as reward:
            scores = reward(
                ready(latents.video),
                ready(latents.audio),
                self.text,
                self.mask,
                torch.full((1,), sigma, device=device),
                video_positions=None if video_grid is None else ready(video_grid.positions()),
                audio_positions=None if audio_grid is None else ready(audio_grid.positions()),
            )
        return {axis: float(score) for axis, score in scores.items()}

    def total(
        self, latents: AV, sigma: float, video_grid: VideoGrid | None, audio_grid: AudioGrid | None
    ) -> float:
        return sum(self(latents, sigma, video_grid, audio_grid).values())


def open_verdict(models: ModelSet, prompt: str, reward: Path | None = None) -> Verdict:
    """The judge of clips of a prompt; the reward model is the one beside the model by default."""
    path = companions.reward_model(models.checkpoint, reward)
    identity = {"kind": "reward text", "text": prompt}
    known = models.recall(identity, "text_encoder")
    if known is None:
        with models.text_encoder() as encoder:
            hidden, mask = encoder.encode([prompt])
        known = {"text": text_states(hidden), "mask": mask}
        models.keep(identity, known, "text_encoder")
    text = known["text"].to(models.device, torch.float32)
    return Verdict(models, path, text, known["mask"].to(models.device))


def check_best_of(models: ModelSet, request: GenerationRequest) -> None:
    """Raises InputError where the seeds of a resolved request could not be judged."""
    if request.best_of == 1:
        return
    if len(request.windows(models.profile.scale.time)) > 1:
        raise InputError(
            "best_of judges a clip that is made at once; leave out window_frames, or best_of."
        )
    companions.reward_model(models.checkpoint, None)
