"""The model that ships, judged by the world it was trained on."""

import numpy as np
import pytest
import torch

from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline
from aiprod_trainer.world.judge import judge


@pytest.fixture(scope="module")
def pipeline() -> TI2VidOneStagePipeline:
    return TI2VidOneStagePipeline.from_model("nano")


def verdict(pipeline: TI2VidOneStagePipeline, prompt: str, seed: int):
    clip = pipeline(prompt, seed=seed)
    frames = np.asarray(torch.cat(list(clip.frames())))
    assert clip.audio is not None
    return judge(frames, clip.audio.samples, clip.audio.sample_rate, clip.request.shape.fps)


@pytest.mark.parametrize("colour", ["red", "blue", "yellow"])
def test_the_object_has_the_colour_that_the_prompt_names(pipeline, colour):
    verdicts = [
        verdict(pipeline, f"A large {colour} ball bounces on the floor.", seed) for seed in (1, 2)
    ]
    assert any(v.colour == colour for v in verdicts)


def test_left_and_right_are_told_apart(pipeline):
    def drift(words: str) -> float:
        clip = pipeline(f"A large red ball rolls {words}.", seed=3)
        frames = torch.cat(list(clip.frames())).float()
        redness = (frames[..., 0] - frames[..., 1:].amax(-1)).clamp(min=60) - 60
        columns = torch.arange(redness.shape[2])
        centre = (redness * columns).sum((1, 2)) / redness.sum((1, 2)).clamp(min=1)
        return float(centre[-3:].mean() - centre[:3].mean())

    assert drift("from left to right") > 0 > drift("from right to left")
