"""Preference pairs, the training of a reward model, and Flow-DPO, on the tiny model."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_reward
from aiprod_pipelines.components import ModelSet
from aiprod_trainer import preferences
from aiprod_trainer.adapters import switched_off
from aiprod_trainer.data import LatentDataset
from aiprod_trainer.objective import flow_dpo_losses
from aiprod_trainer.preferences import (
    MOTION,
    VISUAL,
    captions,
    graded,
    shifted_sounds,
    swapped_words,
)
from aiprod_trainer.prepare_world import prepare
from aiprod_trainer.ranked_pairs import prepare_ranked_pairs
from aiprod_trainer.reward import RewardTrainingConfig
from aiprod_trainer.reward import train as train_reward
from aiprod_trainer.train import train
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise


def scene_of(seed: int, **attributes):
    return sample_scene(np.random.default_rng(seed), **attributes)


@pytest.mark.parametrize("kind", [*VISUAL, *MOTION], ids=lambda kind: kind.__name__)
def test_a_degradation_hurts_more_when_it_is_stronger(kind):
    frames = render(scene_of(0, motion="roll right")).astype(np.float32)
    change = []
    for severity in (0.3, 0.9):
        rng = np.random.default_rng(1)
        change.append(np.abs(kind(frames, severity, rng) - frames).mean())
    assert 0.1 < change[0] < change[1]


def test_what_spoils_the_motion_leaves_the_frames_as_pictures():
    frames = render(scene_of(0, motion="bounce"))
    for kind in (preferences.freeze, preferences.time_warp, preferences.teleport):
        spoilt = kind(frames, 0.8, np.random.default_rng(0))
        known = {frame.tobytes() for frame in frames}
        assert all(frame.tobytes() in known for frame in spoilt), kind.__name__


def test_grades_differ_from_the_clip_and_from_each_other():
    rng = np.random.default_rng(0)
    for seed in range(6):
        frames = render(scene_of(seed))
        for kinds in (VISUAL, MOTION):
            mild, strong = graded(frames, kinds, rng)
            errors = [np.abs(f.astype(float) - frames).mean() for f in (mild, strong)]
            assert 0 < errors[0] < errors[1]


def test_a_shifted_sound_is_the_same_sound_at_another_time():
    found = []
    for seed in range(6):
        scene = scene_of(seed, motion="bounce")
        audio = synthesise(scene)
        for sound in shifted_sounds(scene, audio, np.random.default_rng(seed)) or ():
            ours, theirs = (np.fft.rfft(x[0]) for x in (audio, sound))
            assert np.allclose(abs(ours), abs(theirs), atol=1e-2)
            lag = int(np.fft.irfft(theirs * np.conj(ours)).argmax())
            found.append(min(lag, audio.shape[1] - lag) / SAMPLE_RATE)
    assert len(found) >= 4 and min(found) > 0.1
    assert shifted_sounds(scene_of(3, motion="roll left"), audio, np.random.default_rng(0)) is None


def test_a_wrong_caption_differs_in_one_attribute():
    rng = np.random.default_rng(0)
    for seed in range(20):
        true, wrong = (text.split() for text in captions(scene_of(seed), rng))
        assert true != wrong
        shared = set(true) & set(wrong)
        assert len(shared) > len(set(true)) / 3


def test_words_are_swapped_for_those_of_another_value():
    rng = np.random.default_rng(0)
    for _ in range(20):
        changed = swapped_words("A navy blue ball.", rng)
        assert changed is not None and changed != "A navy blue ball."
        # The whole colour goes, not the name within it; or the shape does.
        assert "navy blue" in changed or ("ball" in changed and "navy" not in changed)
    assert swapped_words("A clip of something.", rng) is None


@pytest.fixture(scope="module")
def reward_config(tiny_model, tmp_path_factory) -> RewardTrainingConfig:
    return RewardTrainingConfig(
        model=str(tiny_model),
        name="tiny",
        output_dir=tmp_path_factory.mktemp("reward"),
        network={"width": 24, "heads": 2, "sync_width": 8},
        clips=6,
        held_out=4,
        batch_size=3,
        steps=4,
        eval_every=2,
    )


@pytest.fixture(scope="module")
def trained_reward(reward_config):
    return train_reward(reward_config)


def test_a_reward_model_trains_and_is_published(trained_reward, reward_config):
    model = load_reward(open_checkpoint(trained_reward))
    assert model.config.width == 24 and trained_reward.name == "tiny-reward.safetensors"
    log = (reward_config.output_dir / "world/log.jsonl").read_text()
    assert "held_sync" in log and "held_text" in log


def test_a_resumed_reward_training_ends_where_an_unbroken_one_does(trained_reward, reward_config):
    settings = reward_config.model_dump()
    again = RewardTrainingConfig(**(settings | {"output_dir": reward_config.output_dir}))
    state = reward_config.output_dir / "world/state.safetensors"
    whole = {k: v.clone() for k, v in load_file(state).items()}
    state.unlink()
    # Stopped after two of its four steps, as by a signal; then the same command once more.
    from aiprod_trainer import reward as module

    class Stopping(module.Run):
        def steps(self):
            for step in super().steps():
                yield step
                self._should_stop = step == 1

    original, module.Run = module.Run, Stopping
    try:
        train_reward(again)
    finally:
        module.Run = original
    train_reward(again)
    resumed = load_file(state)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_captioned_clips_teach_words(trained_reward, reward_config, tiny_model, tmp_path):
    prepare(tiny_model, tmp_path / "latents", clips=3, captions=2)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("pairs", "held_out"):
        (folder / name).symlink_to(reward_config.output_dir / name)
    changes = {"captioned": tmp_path / "latents", "captioned_batch": 2, "steps": 1}
    train_reward(reward_config.model_copy(update=changes | {"output_dir": folder}))
    assert '"captioned"' in (folder / "world/log.jsonl").read_text()


def test_a_generators_clips_are_judged_and_forecast(trained_reward, reward_config, tiny_model):
    config = reward_config.model_copy(
        update={
            "start": trained_reward,
            "generator": str(tiny_model),
            "prompts": 2,
            "seeds": 2,
            "judged": 0,
            "early_steps": (1, 2),
            "steps": 2,
            "generation": {"num_inference_steps": 2},
        }
    )
    train_reward(config)
    log = (reward_config.output_dir / "forecast/log.jsonl").read_text()
    assert "forecast" in log
    data = load_file(reward_config.output_dir / "generated/generated.safetensors")
    assert data["early_video"].shape[:3] == (2, 2, 2)
    assert data["sigma"][0] > data["sigma"][1] > 0


def test_flow_dpo_falls_as_the_better_clip_gains_on_the_reference():
    before = {"video": torch.tensor([1.0]), "audio": torch.tensor([1.0])}
    same = flow_dpo_losses(before, before, before, before, beta=10.0)
    assert float(same) == pytest.approx(np.log(2))
    closer = {name: value - 0.1 for name, value in before.items()}
    assert flow_dpo_losses(closer, before, before, before, 10.0) < same
    assert flow_dpo_losses(before, closer, before, before, 10.0) > same
    # Equation by hand: beta / 2 times the sum over both streams of -0.1.
    by_hand = np.log1p(np.exp(-10 / 2 * 0.2))
    assert float(flow_dpo_losses(closer, before, before, before, 10.0)) == pytest.approx(by_hand)


def test_preferences_are_learnt_against_the_base(configure):
    config = configure(
        training_strategy={"name": "preference", "beta": 100.0},
        optimization={"steps": 16, "learning_rate": 0.01, "batch_size": 4},
    )
    last = train(config)
    lines = (config.output_dir / "log.jsonl").read_text().splitlines()
    losses = [float(line.split('"preference_loss": ')[1].split(",")[0]) for line in lines]
    assert losses[0] == pytest.approx(np.log(2), rel=0.2)  # the LoRA begins as nothing
    assert np.mean(losses[4:]) < np.log(2) - 0.01
    assert (last / "lora.safetensors").is_file()


def test_preference_training_needs_a_base_that_stays(configure):
    with pytest.raises(InputError, match="training_mode lora"):
        configure(training_strategy={"name": "preference"}, model={"training_mode": "full"})


def test_ranked_pairs_are_a_data_set_with_the_worse_clip_beside_the_better(
    trained_reward, tiny_model, tmp_path
):
    models = ModelSet.open(str(tiny_model))
    prepare_ranked_pairs(models, tmp_path, prompts=2, seeds=2, reward=trained_reward)
    data = LatentDataset(tmp_path, max_length=16)
    batch = data.draw(data.buckets[0], [np.random.default_rng(0)] * 2, caption_dropout=0.5)
    assert batch.video is not None and batch.fps == 12
    assert batch.extras["rejected_video"].shape == batch.video.shape
    assert not torch.equal(batch.extras["rejected_video"], batch.video)
    with pytest.raises(InputError, match=r"tiny-reward\.safetensors"):
        prepare_ranked_pairs(models, tmp_path / "other", prompts=2)


def test_a_lora_that_is_switched_off_leaves_the_base(tiny_model):
    from aiprod_trainer.adapters import LoraLinear, attach

    module = torch.nn.Sequential(torch.nn.Linear(3, 3))
    x = torch.randn(2, 3)
    base = module(x)
    attach(module, ["0"], rank=2, alpha=2)
    assert isinstance(module[0], LoraLinear)
    module[0].lora_B.data.normal_()
    with switched_off(module):
        assert torch.equal(module(x), base)
    assert not torch.allclose(module(x), base)
