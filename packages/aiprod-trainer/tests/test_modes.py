"""Modes: what is noised, what is given, and what the loss sees."""

import numpy as np
import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_core.types import ScaleFactors
from aiprod_trainer.data import Batch, LatentDataset
from aiprod_trainer.modes import MODES, Condition, Mode, Stream, check_mode, condition_batch
from aiprod_trainer.objective import draw_sigmas, noise_state, sample_losses, shift_for
from aiprod_trainer.training_config import StrategySection, mode_of

SCALE = ScaleFactors(4, 8, 8)
FRAMES, SIDE, MOMENTS = 5, 4, 40


def batch() -> Batch:
    def random(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    extras = {
        "reference_latents": random(2, 8, FRAMES, 2, 2),
        "reference_audio_latents": random(2, 2, 11, 4),
        "video_masks": (random(2, FRAMES, SIDE, SIDE) > 0).float(),
        "audio_masks": (random(2, MOMENTS) > 0).float(),
    }
    video, audio = random(2, 8, FRAMES, SIDE, SIDE), random(2, 2, MOMENTS, 4)
    return Batch(video, audio, {}, torch.ones(2, 4), extras, 10.0)


def conditioned(mode: Mode, seed: int = 0):
    return condition_batch(mode, batch(), np.random.default_rng(seed), scale=SCALE, fps=10.0)


def given(mode: Mode, stream: str = "video", seed: int = 0) -> torch.Tensor:
    """(B, N) booleans over the clip's own tokens."""
    result = conditioned(mode, seed)[stream]
    return result.state.denoise_mask[:, : result.grid.num_tokens, 0] == 0


def only(**condition) -> Mode:
    return Mode(Stream(conditions=(Condition(**condition),)), None)


def test_text_to_video_gives_nothing():
    streams = conditioned(MODES["text-to-video"])
    assert all(stream.is_uniform and not stream.is_given for stream in streams.values())
    assert not given(MODES["text-to-video"]).any()


def test_image_to_video_gives_the_first_latent_frame():
    rows = given(MODES["image-to-video"]).reshape(2, FRAMES, -1)
    assert rows[:, 0].all() and not rows[:, 1:].any()


def test_a_prefix_cuts_picture_and_sound_at_the_same_moment():
    for seed in range(8):
        streams = conditioned(MODES["video-extend"], seed)
        times = {}
        for name, stream in streams.items():
            mask = stream.state.denoise_mask[0, :, 0]
            ends = stream.state.positions[0, 0, :, 1]
            given_until = ends[mask == 0].max() if (mask == 0).any() else torch.tensor(0.0)
            assert given_until <= ends[mask == 1].min()
            times[name] = float(given_until)
        assert abs(times["video"] - times["audio"]) <= SCALE.time / 10.0 + 0.04


def test_a_suffix_gives_the_end():
    rows = given(only(type="suffix", temporal_boundary=0.9)).reshape(2, FRAMES, -1)
    # Latent frames begin at 0, 0.1, 0.5, 0.9 and 1.3 s.
    assert rows[0, :, 0].tolist() == [False, False, False, True, True]


def test_a_crop_gives_the_same_rectangle_in_every_frame():
    mode = only(type="spatial_crop", spatial_region=(0.0, 0.0, 0.5, 1.0))
    rows = given(mode).reshape(2, FRAMES, SIDE, SIDE)
    assert rows[..., :2].all() and not rows[..., 2:].any()


def test_a_mask_gives_where_it_is_one():
    mask = batch().extras["video_masks"].flatten(1).bool()
    assert torch.equal(given(MODES["video-inpainting"]), mask)
    sound = batch().extras["audio_masks"].bool()
    assert torch.equal(given(MODES["audio-inpainting"], "audio"), sound)


def test_a_reference_is_appended_clean_over_the_same_space():
    stream = conditioned(MODES["video-to-video"])["video"]
    state, own = stream.state, stream.grid.num_tokens
    assert (state.denoise_mask[:, own:] == 0).all()
    assert state.positions[:, 1:, own:].max() == state.positions[:, 1:, :own].max() == 32
    tokens = stream.grid.patchify(batch().extras["reference_latents"])
    assert torch.equal(state.clean_latent[:, own:], tokens)


def test_a_given_stream_is_clean_and_has_no_loss():
    streams = conditioned(MODES["audio-to-video"])
    assert streams["audio"].is_given
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noised = noise_state(
        streams["audio"].state, torch.zeros(2), torch.zeros(2, 1, 4), generators,
        num_tokens=MOMENTS, is_uniform=True,
    )  # fmt: skip
    assert torch.equal(noised.modality.latent, streams["audio"].state.clean_latent)
    assert (sample_losses(noised.target + 1, noised) == 0).all()


@pytest.mark.parametrize("name", ["image-to-video", "video-to-video", "video-inpainting"])
def test_one_exact_step_along_the_target_reaches_the_clean_tokens(name):
    stream = conditioned(MODES[name])["video"]
    sigma = torch.tensor([0.3, 0.8])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noised = noise_state(
        stream.state, sigma, torch.zeros(2, 1, 4), generators,
        num_tokens=stream.grid.num_tokens, is_uniform=False,
    )  # fmt: skip
    modality = noised.modality
    reached = modality.latent - noised.target * modality.timesteps
    torch.testing.assert_close(reached, stream.state.clean_latent, atol=1e-5, rtol=0)
    wrong_where_given = noised.target + 9 * (stream.state.denoise_mask == 0)
    assert (sample_losses(wrong_where_given, noised) == 0).all()


def test_a_samples_noise_does_not_depend_on_its_batch():
    state = conditioned(MODES["text-to-video"])["video"].state

    def noised(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        sigma = draw_sigmas(
            generators, shift=1.0, uniform_share=0.1, joint_share=0.5, clean_share=0.2
        )[0]
        part = type(state)(
            state.latent[: len(seeds)], state.clean_latent[: len(seeds)],
            state.denoise_mask[: len(seeds)], state.positions[: len(seeds)],
        )  # fmt: skip
        return noise_state(
            part, sigma, torch.zeros(len(seeds), 1, 4), generators,
            num_tokens=part.latent.shape[1], is_uniform=True,
        ).modality.sigma  # fmt: skip

    assert torch.equal(noised([3, 4])[0], noised([3])[0])


def test_longer_sequences_are_trained_at_more_noise():
    assert shift_for(100) == shift_for(1024) == pytest.approx(0.95)
    assert shift_for(2560) == pytest.approx(1.5)
    assert shift_for(10**6) == pytest.approx(2.05)


def test_joint_and_clean_shares_are_kept():
    generators = [torch.Generator().manual_seed(i) for i in range(1000)]
    video, audio = draw_sigmas(
        generators, shift=0.0, uniform_share=0.0, joint_share=0.5, clean_share=0.25
    )
    assert (video == audio).float().mean() == pytest.approx(0.5, abs=0.06)
    assert ((video == 0) != (audio == 0)).float().mean() == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (Mode(Stream(is_generated=False), None), "nothing is generated"),
        (Mode(None, Stream(conditions=(Condition(type="first_frame"),))), "of the picture"),
        (only(type="mask", probability=1.5), "from 0 to 1"),
    ],
)
def test_a_mode_without_sense_is_refused(mode, message):
    with pytest.raises(InputError, match=message):
        check_mode(mode)


def test_older_names_are_rows_with_a_first_frame_now_and_then():
    section = StrategySection(
        name="video_to_video", reference_latents_dir="reference_canny", with_audio=False
    )
    video = mode_of(section).video
    assert video is not None
    kinds = [(c.type, c.probability, c.latents_dir) for c in video.conditions]
    assert kinds == [("first_frame", 0.1, None), ("reference", 1.0, "reference_canny")]


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(InputError, match="did you mean video-inpainting"):
        mode_of(StrategySection(name="video_inpaint"))


def test_batches_come_from_one_bucket_and_every_bucket_is_drawn(make_part, tmp_path):
    make_part(tmp_path / "part-00000.safetensors", clips=4)
    make_part(tmp_path / "part-00001.safetensors", clips=2, size=5, seed=1)
    make_part(tmp_path / "part-00002.safetensors", clips=2, size=5, seed=2, audio=None)
    data = LatentDataset(tmp_path, 16)
    assert sorted(len(bucket.clips) for bucket in data.buckets) == [2, 2, 4]
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        drawn = data.draw(data.draw_bucket(rng), [rng] * 3, 0.0)
        assert drawn.video is not None and len(drawn) == 3 and drawn.fps == 12
        seen.add((drawn.video.shape[-1], drawn.audio is None))
    assert seen == {(3, False), (5, False), (5, True)}


def test_larger_clips_come_in_smaller_batches_of_as_many_tokens(make_part, tmp_path):
    (tmp_path / "128").mkdir()
    make_part(tmp_path / "part-00000.safetensors", clips=4)
    make_part(tmp_path / "128" / "part-00000.safetensors", clips=4, size=6, seed=1)
    data = LatentDataset(tmp_path, 16)
    small, large = sorted(data.buckets, key=lambda bucket: bucket.num_tokens)
    assert large.num_tokens == 4 * small.num_tokens
    assert [data.as_many_tokens(bucket, 32) for bucket in (small, large)] == [32, 8]
    assert data.as_many_tokens(large, 2) == 1  # never none


def test_a_caption_cannot_be_dropped_without_features_of_the_empty_one(latents):
    data = LatentDataset(latents, 16)
    with pytest.raises(InputError, match="set caption_dropout to 0"):
        data.draw(data.buckets[0], [np.random.default_rng(0)], 1.0)
