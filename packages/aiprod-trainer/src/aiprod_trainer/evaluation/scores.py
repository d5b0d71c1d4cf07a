"""Clips to figures: each judged against its prompt and measured, then shares over all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from aiprod_core.errors import InputError
from aiprod_pipelines import decoding, encoding, media
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.metrics.report import Report, measure, read_clip
from aiprod_pipelines.progress import Progress
from aiprod_trainer.evaluation.prompts import Prompt
from aiprod_trainer.world.captions import sound_kind
from aiprod_trainer.world.hearing import find_sound, heard_events
from aiprod_trainer.world.judge import Verdict, agreement, judge, sync_error_ms
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import Scene
from aiprod_trainer.world.seeing import SIDE
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise

ATTRIBUTES = ("colour", "shape", "motion", "camera", "sound", "size", "background", "ambience")
IN_SYNC_MS = 40
CODEC_SCENES = 48  # of the prompts' scenes, how many the codecs are tried on

# The scoreboard's goals: (at least, at most).
GOALS: dict[str, tuple[float | None, float | None]] = {
    "vae_psnr": (32.0, None),
    "audio_onset_ms": (None, 10.0),
    "audio_class": (0.95, None),
    "colour": (0.95, None),
    "shape": (0.90, None),
    "motion": (0.90, None),
    "camera": (0.90, None),
    "sound": (0.90, None),
    "sync_ms": (None, 40.0),
    "sync_over_shuffled": (None, 0.25),
    "distilled_share": (0.90, None),
}
SHARES = ("colour", "shape", "motion", "camera", "sound", "in_sync")  # that distilling may cost


@dataclass(eq=False)
class Row:
    """One clip: its file, what it was asked for, what the judge found right, what was measured."""

    file: Path
    prompt: str
    report: Report
    right: dict[str, bool] = field(default_factory=dict)  # of what the prompt states
    verdict: Verdict | None = None
    has_synonyms: bool = False
    picture_s: float = 0.0  # when the last frame is shown
    is_eventful: bool = False  # the prompt states a motion that is heard in events

    @property
    def score(self) -> float | None:
        """Share right of what was stated; None where nothing was, or nothing could be judged."""
        return mean(self.right.values()) if self.right else None

    @property
    def sync_ms(self) -> float | None:
        return self.verdict.sync_ms if self.verdict else None

    def figures(self) -> dict[str, float]:
        """All numbers of this clip, for comparing it with another of the same prompt."""
        judged = {name: float(value) for name, value in self.right.items()}
        if self.score is not None:
            judged = {"score": self.score, **judged}
        if self.sync_ms is not None:
            judged |= {"sync_ms": self.sync_ms, "in_sync": float(self.sync_ms <= IN_SYNC_MS)}
        measured = {k: v for k, v in self.report.figures.items() if isinstance(v, float | int)}
        return judged | measured

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"file": str(self.file), "prompt": self.prompt}
        if self.verdict is not None:
            found = {name: getattr(self.verdict, name) for name in ATTRIBUTES}
            times = {"seen_s": self.verdict.seen_s, "heard_s": self.verdict.heard_s}
            row |= {"right": self.right, "judged": found, "sync_ms": self.sync_ms}
            row |= {name: [round(t, 3) for t in values] for name, values in times.items()}
        return row | self.report.to_dict()


def judge_clip(path: Path, prompt: Prompt) -> Row:
    """Judges the file, as a viewer gets it. Raises InputError for a picture the judge cannot take,
    where the prompt is about the world."""
    frames, fps, audio = read_clip(path)
    row = Row(path, prompt.text, measure(frames, fps, audio), has_synonyms=prompt.has_synonyms)
    if prompt.scene is None:
        return row
    if frames is None or frames.shape[1] != frames.shape[2] or frames.shape[1] % SIDE:
        raise InputError(
            f"{path}: the world's judge looks at square pictures of a multiple of {SIDE} pixels; "
            "set height and width so, or give prompts of your own with --prompts."
        )
    sound = media.Audio(np.zeros((2, SAMPLE_RATE), np.float32), SAMPLE_RATE)
    if audio is not None:
        sound = media.resample(audio, SAMPLE_RATE, channels=2)
    row.verdict = judge(frames, sound.samples, SAMPLE_RATE, fps)
    row.picture_s = (len(frames) - 1) / fps
    row.is_eventful = "motion" in prompt.stated and bool(prompt.scene.events)
    agrees = agreement(row.verdict, prompt.scene)
    row.right = {
        name: bool(agrees[name])
        for name in ATTRIBUTES
        if name in prompt.stated and name in agrees  # ambience is not heard under other sounds
    }
    return row


def score_rows(rows: Sequence[Row]) -> dict[str, float | None]:
    """Shares right and times over all clips. A key is None where no prompt asked for it; those in
    `_n` count what a figure is over, those in `_synonyms` are over the prompts that have them."""
    scores: dict[str, float | None] = {}
    for suffix, chosen in (("", list(rows)), ("_synonyms", [r for r in rows if r.has_synonyms])):
        for name in ATTRIBUTES:
            values = [row.right[name] for row in chosen if name in row.right]
            scores[name + suffix] = round(mean(values), 4) if values else None
            if not suffix:
                scores[f"{name}_n"] = len(values)
    return scores | sync_scores([row for row in rows if row.verdict is not None])


def sync_scores(rows: Sequence[Row]) -> dict[str, float | None]:
    """The median sync error in ms, and the same with each clip's sound swapped for the next's.

    `in_sync` is the share, of the `sync_due` clips whose prompt states a motion with events, that
    lie within 40 ms; where no event is seen or heard there is no error, but no sync either.
    """
    verdicts = [(row.verdict, row.picture_s) for row in rows if row.verdict is not None]
    matched = [v.sync_ms for v, _ in verdicts if v.sync_ms is not None]
    due = [row for row in rows if row.is_eventful]
    eventful = [(v, end) for v, end in verdicts if v.seen_s and v.heard_s]
    swapped = [
        error
        for (seen, end), (heard, _) in zip(eventful, eventful[1:] + eventful[:1], strict=True)
        if (error := sync_error_ms(seen.seen_s, heard.heard_s, end - 0.05)) is not None
    ]
    in_sync = [row.sync_ms is not None and row.sync_ms <= IN_SYNC_MS for row in due]
    # One clip has no other to be swapped with.
    shuffled = round(median(swapped), 1) if len(eventful) > 1 else None
    error = round(median(matched), 1) if matched else None
    return {
        "sync_ms": error,
        "sync_shuffled_ms": shuffled,
        "sync_over_shuffled": round(error / shuffled, 4)
        if error is not None and shuffled
        else None,
        "in_sync": round(mean(in_sync), 4) if due else None,
        "sync_n": len(matched),
        "sync_due": len(due),
    }


def distilled_share(dev: dict[str, Any], distilled: dict[str, Any]) -> float | None:
    """The mean of the distilled model's shares over that of the model it was distilled from."""
    pairs = [(dev[k], distilled[k]) for k in SHARES if None not in (dev[k], distilled[k])]
    whole = sum(ours for ours, _ in pairs)
    return round(sum(theirs for _, theirs in pairs) / whole, 4) if whole else None


@torch.inference_mode()
def codec_scores(models: ModelSet, scenes: Iterable[Scene]) -> dict[str, float | None]:
    """True clips through the model's codecs and back: `vae_psnr` in dB over the mean of clips,
    `audio_onset_ms` the median distance of onsets, `audio_class` the share of sounds that are
    still heard as what they are."""
    quiet = Progress()
    psnr, onset_ms, same = [], [], []
    for scene in scenes:
        frames = render(scene, models.profile.height)
        latent = encoding.encode_frames(models, frames, quiet)
        decoded = torch.cat(list(decoding.decode_video(models, latent, quiet))).cpu().numpy()
        error = np.square(decoded.astype(np.float32) - frames[: len(decoded)]).mean()
        psnr.append(float(10 * np.log10(255**2 / max(error, 1e-6))))
        sound, kind = synthesise(scene), sound_kind(scene.body)
        count = round(scene.duration_s * models.audio_config.latents_per_second)
        coded = encoding.encode_audio(models, media.Audio(sound, SAMPLE_RATE), count, quiet)
        back = decoding.decode_audio(models, coded, scene.duration_s, quiet)
        heard = media.resample(back, SAMPLE_RATE, channels=2).samples
        same.append(find_sound(heard, SAMPLE_RATE) == kind)
        truth = heard_events(sound, kind, SAMPLE_RATE)
        error_ms = sync_error_ms(truth, heard_events(heard, kind, SAMPLE_RATE))
        if error_ms is not None:
            onset_ms.append(error_ms)
    return {
        "vae_psnr": round(mean(psnr), 2) if psnr else None,
        "audio_onset_ms": round(median(onset_ms), 2) if onset_ms else None,
        "audio_class": round(mean(same), 4) if same else None,
    }


def is_reached(name: str, value: float | None) -> bool | None:
    """Whether a figure meets its goal; None where it has none, or was not measured."""
    if name not in GOALS or value is None:
        return None
    low, high = GOALS[name]
    return (low is None or value >= low) and (high is None or value <= high)
