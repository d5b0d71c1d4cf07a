"""The reward network: what it is told, what it must not depend on, what its parts can see."""

import pytest
import torch

from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.errors import CheckpointError
from aiprod_core.model.reward import (
    RewardConfig,
    RewardModel,
    init_reward,
    lag_profile,
    text_states,
    within_frames,
)
from aiprod_core.types import AudioLatentShape, ScaleFactors, VideoLatentShape

CONFIG = RewardConfig(
    video_channels=8, audio_channels=32, text_width=8, width=24, heads=2, sync_width=8, lags=4
)
VIDEO = VideoGrid(VideoLatentShape(1, 8, 4, 2, 2), ScaleFactors(4, 8, 8), 12)
AUDIO = AudioGrid(AudioLatentShape(1, 2, 27, 16))


@pytest.fixture(scope="module")
def model() -> RewardModel:
    model = RewardModel(CONFIG)
    init_reward(model, torch.Generator().manual_seed(0))
    for parameter in model.parameters():  # nothing is zero, so that everything has a say
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=seeded(1))
    return model.eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(model: RewardModel, count: int = 2, *, text_mask=None, sigma: float = 0.0, **changes):
    inputs = {
        "video": torch.randn(count, 8, 4, 2, 2, generator=seeded(2)),
        "audio": torch.randn(count, 2, 27, 16, generator=seeded(3)),
        "text": torch.randn(count, 5, 8, generator=seeded(4)),
        **changes,
    }
    mask = torch.ones(count, inputs["text"].shape[1]) if text_mask is None else text_mask
    with torch.inference_mode():
        return model(
            *inputs.values(),
            mask,
            torch.full((count,), sigma),
            video_positions=VIDEO.positions(),
            audio_positions=AUDIO.positions(),
        )


def test_a_clip_scores_the_same_alone_and_in_a_batch(model):
    whole = scores(model)
    video = torch.randn(2, 8, 4, 2, 2, generator=seeded(2))[1:]
    audio = torch.randn(2, 2, 27, 16, generator=seeded(3))[1:]
    text = torch.randn(2, 5, 8, generator=seeded(4))[1:]
    alone = scores(model, 1, video=video, audio=audio, text=text)
    for axis, score in alone.items():
        torch.testing.assert_close(score, whole[axis][1:], atol=1e-5, rtol=1e-4)


def test_padding_of_the_text_changes_nothing(model):
    text = torch.randn(2, 5, 8, generator=seeded(4))
    padded = torch.cat((text, torch.full((2, 3, 8), 9.0)), dim=1)
    mask = torch.tensor([[1.0] * 5 + [0.0] * 3] * 2)
    torch.testing.assert_close(
        scores(model, text=padded, text_mask=mask)["text"], scores(model)["text"]
    )


def test_only_what_is_there_is_judged(model):
    assert set(scores(model)) == {"visual", "motion", "text", "sync"}
    assert set(scores(model, audio=None)) == {"visual", "motion", "text"}
    assert set(scores(model, video=None)) == {"text"}


def test_an_axis_depends_on_its_own_evidence(model):
    before = scores(model)
    louder = scores(model, audio=torch.randn(2, 2, 27, 16, generator=seeded(9)))
    for axis in ("visual", "motion"):
        assert torch.equal(before[axis], louder[axis])
    assert not torch.allclose(before["sync"], louder["sync"])
    noisier = scores(model, sigma=0.9)
    assert all(not torch.allclose(before[axis], noisier[axis]) for axis in before)


def test_the_lag_profile_peaks_where_the_sound_is_late():
    signal = torch.randn(1, 60, 6, generator=seeded(5))
    for late in (-3, 0, 4):
        profile = lag_profile(signal, signal.roll(late, 1), lags=6)
        assert int(profile.argmax()) - 6 == late


def test_each_moment_of_sound_finds_its_latent_frame():
    times = VIDEO.positions()[0, 0].unique_consecutive(dim=0)  # 1, 4, 4, 4 frames at 12 a second
    index, place = within_frames(times, torch.tensor([0.04, 0.1, 0.35, 0.5, 9.0]))
    assert index.tolist() == [0, 1, 1, 2, 3]
    torch.testing.assert_close(place[2], torch.tensor((0.35 - 1 / 12) * 3))
    assert float(place[4]) == 1.0  # after the end the last frame stands


def test_text_states_weigh_every_layer_alike():
    hidden = torch.randn(1, 3, 8, 4, generator=seeded(6))
    scaled = hidden * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    torch.testing.assert_close(text_states(scaled), text_states(hidden), atol=1e-4, rtol=1e-4)


def test_the_configuration_survives_the_header():
    assert RewardConfig.from_metadata(CONFIG.to_metadata()) == CONFIG
    with pytest.raises(CheckpointError, match="depth"):
        RewardConfig.from_metadata({**CONFIG.to_metadata(), "depth": 3})
    with pytest.raises(CheckpointError, match="text_width"):
        RewardConfig.from_metadata({"video_channels": 8, "audio_channels": 32})
