"""The model that ships follows words in picture and sound; how well is on the scoreboard."""

import numpy as np
import pytest
import torch

from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline


@pytest.fixture(scope="module")
def pipeline() -> TI2VidOneStagePipeline:
    return TI2VidOneStagePipeline.from_model("nano")


def test_red_and_blue_follow_the_prompt(pipeline: TI2VidOneStagePipeline):
    def redness(colour: str) -> float:
        clip = pipeline(f"A large {colour} ball on a grey floor.", seed=1, generate_audio=False)
        frames = torch.cat(list(clip.frames())).float()
        return float((frames[..., 0] - frames[..., 2]).mean())

    assert redness("red") > redness("blue") + 5


def test_rolling_sounds_all_along_and_bouncing_at_moments(pipeline: TI2VidOneStagePipeline):
    def share_of_loud_moments(prompt: str) -> float:
        clip = pipeline(prompt, seed=7)
        assert clip.audio is not None
        loudness = np.abs(clip.audio.samples).max(axis=0)[:32000].reshape(100, -1).max(axis=1)
        assert loudness.max() > 0.02
        return float((loudness > 0.3 * loudness.max()).mean())

    rolling = share_of_loud_moments("a large blue ball rolls to the right, with a rumbling noise")
    bouncing = share_of_loud_moments("a red rubber ball bounces, with a thud at each bounce")
    assert rolling > 2 * bouncing
