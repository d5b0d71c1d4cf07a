import numpy as np
import pytest

from aiprod_core.errors import InputError
from aiprod_trainer.world.judge import agreement, damage, judge, sync_error_ms
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise


def shares_right(count: int, seed: int, damaged: bool, world: str = "v1") -> dict[str, float]:
    rng = np.random.default_rng(seed)
    rows: dict[str, list[float]] = {}
    for _ in range(count):
        scene = sample_scene(rng, world=world)
        frames, audio = render(scene), synthesise(scene)
        if damaged:
            frames, audio = damage(frames, audio, rng)
        for key, value in agreement(judge(frames, audio), scene).items():
            rows.setdefault(key, []).append(float(value))
    return {k: np.median(v) if k.endswith("_ms") else np.mean(v) for k, v in rows.items()}


def test_the_judge_is_right_on_40_true_renders():
    shares = shares_right(40, seed=11, damaged=False)
    times = {key: shares.pop(key) for key in list(shares) if key.endswith("_ms")}
    assert min(shares.values()) >= 0.97, shares
    assert max(times.values()) < 5, times


def test_the_judge_survives_blur_and_noise():
    shares = shares_right(16, seed=12, damaged=True)
    times = {key: shares.pop(key) for key in list(shares) if key.endswith("_ms")}
    assert min(shares.values()) >= 0.9, shares
    assert max(times.values()) < 10, times


def test_the_judge_is_right_on_world_v2_with_its_cameras_and_second_objects():
    shares = shares_right(24, seed=13, damaged=False, world="v2")
    times = {key: shares.pop(key) for key in list(shares) if key.endswith("_ms")}
    assert min(shares.values()) >= 0.94, shares
    assert shares["camera"] == 1.0
    assert max(times.values()) < 8, times


def test_delayed_sound_is_measured_as_that_much_out_of_sync():
    scene = sample_scene(np.random.default_rng(0), motion="fall", material="wood")
    late = np.roll(synthesise(scene), round(0.1 * SAMPLE_RATE), axis=1)
    assert judge(render(scene), late).sync_ms == pytest.approx(100, abs=8)


def test_an_object_in_two_places_is_incoherent():
    rng = np.random.default_rng(1)
    scene = sample_scene(rng, motion="fall", background="grey", colour="red", size="small")
    frames = render(scene)
    doubled = np.minimum(frames, frames[:, :, ::-1])
    doubled[..., 0] = np.maximum(frames, frames[:, :, ::-1])[..., 0]
    audio = synthesise(scene)
    assert judge(frames, audio).track.coherence > 0.99
    assert judge(doubled, audio).track.coherence < 0.7


def test_silence_and_an_empty_stage_are_called_so():
    scene = sample_scene(np.random.default_rng(2), motion="pulse")
    verdict = judge(render(scene), np.zeros((2, 33333), dtype=np.float32))
    assert verdict.sound == "silence"
    assert verdict.sync_ms is None
    frozen = np.repeat(render(scene)[:1], 25, axis=0)
    assert judge(frozen, synthesise(scene)).motion == "still"


def test_superfluous_sounds_cost_as_much_as_missing_ones():
    assert sync_error_ms((0.5,), (0.5, 1.0, 1.5)) == pytest.approx(250)
    assert sync_error_ms((0.5, 1.0, 1.5), (0.5,)) == pytest.approx(250)
    assert sync_error_ms((0.5,), (0.5, 2.1), until_s=2.0) == pytest.approx(0)
    assert sync_error_ms((), (0.5,)) is None


def test_larger_pictures_are_judged_alike():
    scene = sample_scene(np.random.default_rng(3))
    small, large = (judge(render(scene, size), synthesise(scene)) for size in (64, 128))
    assert (small.colour, small.shape, small.motion) == (large.colour, large.shape, large.motion)
    assert small.track.x == pytest.approx(large.track.x, abs=0.01)


def test_a_picture_of_the_wrong_layout_is_refused():
    with pytest.raises(InputError, match=r"\(F, S, S, 3\)"):
        judge(np.zeros((25, 3, 64, 64)), np.zeros((2, 100)))
