from itertools import pairwise

import numpy as np
import pytest

from aiprod_core.errors import InputError
from aiprod_trainer.world.camera import CAMERAS
from aiprod_trainer.world.captions import HELD_OUT, WORDS, describe
from aiprod_trainer.world.figure import JOINTS, joints
from aiprod_trainer.world.ground_truth import body_track, depth, edges, key_points, pose
from aiprod_trainer.world.render import backdrop, object_mask, render, signed_distance
from aiprod_trainer.world.scene import (
    BOTTOM,
    COLOURS,
    FIGURE,
    FLOOR_Y,
    MATERIALS,
    MOTIONS,
    MOTIONS_V2,
    SHAPES,
    TEXTURED_BACKGROUNDS,
    sample_scene,
    trajectory,
)
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise


def scene_of(seed: int, **fixed):
    return sample_scene(np.random.default_rng(seed), **fixed)


def test_the_same_seed_gives_the_same_clip_and_another_seed_does_not():
    first, again, other = scene_of(5), scene_of(5), scene_of(6)
    assert first == again
    assert np.array_equal(render(first), render(again))
    assert np.array_equal(synthesise(first), synthesise(again))
    assert not np.array_equal(render(first), render(other))


def test_a_clip_has_25_frames_and_sound_of_the_same_length():
    scene = scene_of(0)
    assert render(scene, 32).shape == (25, 32, 32, 3)
    assert synthesise(scene).shape == (2, round(25 / 12 * SAMPLE_RATE))


@pytest.mark.parametrize("material", MATERIALS)
def test_an_impact_is_heard_within_5_ms_of_its_time(material):
    for seed in range(8):
        scene = scene_of(seed, motion="fall", material=material)
        power = np.abs(synthesise(scene)).max(0)
        heard = np.argmax(power > 0.1 * power.max()) / SAMPLE_RATE
        assert abs(heard - scene.events[0].time_s) < 0.005


def test_at_an_impact_the_object_touches_the_floor():
    for seed in range(12):
        scene = scene_of(seed, motion="bounce")
        times = np.array([event.time_s for event in scene.events])
        assert len(times) >= 2
        assert trajectory(scene.body, times).y == pytest.approx(scene.body.rest_y, abs=1e-6)


def test_between_impacts_a_bounce_is_free_flight_and_never_gains_height():
    scene = scene_of(2, motion="bounce")
    times = [event.time_s for event in scene.events]
    apex = [
        trajectory(scene.body, np.linspace(start, end, 201)).y.min()
        for start, end in pairwise(times)
    ]
    assert np.all(np.diff(apex) > 0)
    middle = np.linspace(times[0] + 0.01, times[1] - 0.01, 101)
    acceleration = np.diff(trajectory(scene.body, middle).y, 2) / (middle[1] - middle[0]) ** 2
    assert acceleration == pytest.approx(4.4, abs=1e-3)


@pytest.mark.parametrize(("motion", "sign"), [("roll right", 1), ("roll left", -1)])
def test_rolling_moves_the_track_and_the_pictures_towards_its_side(motion, sign):
    for seed in range(6):
        scene = scene_of(seed, motion=motion)
        assert np.all(sign * np.diff(trajectory(scene.body, scene.frame_times_s).x) > 0)
        mask = object_mask(scene)
        centre = (mask.sum(1) * np.arange(64)).sum(1) / mask.sum((1, 2))
        assert sign * (centre[-1] - centre[0]) > 20


def test_a_rolling_ball_turns_by_the_arc_it_travels():
    scene = scene_of(1, motion="roll right", shape="ball")
    path = trajectory(scene.body, scene.frame_times_s)
    assert np.diff(path.angle) * scene.body.radius == pytest.approx(np.diff(path.x))


def test_sound_comes_from_the_side_of_the_object():
    for seed in range(6):
        scene = scene_of(seed, motion="roll right")
        left, right = np.square(synthesise(scene)).reshape(2, 3, -1).mean(-1)
        assert left[0] > right[0]
        assert right[-1] > left[-1]
    for seed in range(20):
        scene = scene_of(seed, motion="fall")
        left, right = np.square(synthesise(scene)).mean(-1)
        assert (right > left) == (scene.body.x > 0.5)


def test_harder_impacts_are_louder():
    scene = scene_of(3, motion="bounce", material="wood")
    sound = np.abs(synthesise(scene)).max(0)
    starts = [round(e.time_s * SAMPLE_RATE) for e in scene.events if e.time_s < 1.9]
    peaks = [sound[start : start + 800].max() for start in starts]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_stands_on_the_floor(shape):
    scene = scene_of(4, motion="fall", shape=shape)
    lowest = np.flatnonzero(object_mask(scene, 256)[-1].max(1) > 0.5).max() + 1
    assert lowest / 256 == pytest.approx(FLOOR_Y, abs=2.5 / 256)
    bottom = signed_distance(shape, np.linspace(-1, 1, 401), np.full(401, -BOTTOM[shape]))
    assert bottom.min() == pytest.approx(0.0, abs=0.05)


def test_the_mask_covers_the_object_and_nothing_else():
    scene = scene_of(7, motion="bounce", colour="red", background="grey")
    frames, mask = render(scene).astype(int), object_mask(scene)
    redness = frames[..., 0] - frames[..., 1]
    assert redness[mask > 0.95].min() > 60
    assert redness[mask == 0].max() < 15


def test_colours_are_spread_evenly_and_never_vanish_before_the_background():
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng).body.colour for _ in range(2000)]
    counts = [drawn.count(name) for name in COLOURS]
    assert min(counts) > 140
    with pytest.raises(InputError, match=r"black.*not possible"):
        scene_of(0, colour="black", background="night")


def test_an_unknown_word_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="choose from bounce"):
        scene_of(0, motion="explode")


def test_world_v1_draws_the_same_scenes_as_when_nano_was_trained():
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng) for _ in range(5)]
    looks = [(s.body.colour, s.body.shape, s.body.motion, s.background) for s in drawn]
    assert looks == [
        ("green", "triangle", "roll left", "grey"),
        ("pink", "triangle", "pulse", "night"),
        ("orange", "ring", "pulse", "grey"),
        ("purple", "ball", "roll right", "cream"),
        ("black", "heart", "fall", "sky"),
    ]
    assert drawn[0].noise_seed == 1394609703
    assert drawn[0].body.x == pytest.approx(0.6824123260327589)


@pytest.mark.parametrize("motion", MOTIONS_V2)
def test_world_v2_draws_every_motion_under_every_camera(motion):
    rng = np.random.default_rng(3)
    for camera in CAMERAS:
        scene = sample_scene(rng, world="v2", motion=motion, camera=camera)
        assert (scene.body.motion, scene.camera) == (motion, camera)
        if camera != "static":
            assert scene.background in TEXTURED_BACKGROUNDS
        assert render(scene, 32).std() > 5


def test_a_camera_move_passes_the_resting_view_halfway():
    scene = scene_of(1, world="v2", motion="fall", camera="dolly left", background="brick")
    seen = scene.view(scene.frame_times_s)
    moving, still = backdrop("brick", 64, seen), backdrop("brick", 64)
    assert moving[12] == pytest.approx(still[0], abs=1e-2)
    assert np.abs(moving[0] - still[0]).mean() > 3


def test_colliding_objects_touch_when_they_clash_and_keep_their_momentum():
    scene = scene_of(1, world="v2", motion="collide", shape="ball", camera="static")
    (clash,) = scene.events
    first, second = scene.bodies
    at = [trajectory(b, np.array([clash.time_s])).x[0] for b in scene.bodies]
    assert at[1] - at[0] < 1.25 * (first.radius + second.radius)
    masses = np.array([first.radius**2, second.radius**2])
    before = masses @ [first.speed, second.speed]
    assert masses @ [first.speed_after, second.speed_after] == pytest.approx(before)


def test_the_walkers_standing_foot_does_not_slip():
    scene = scene_of(2, world="v2", motion="walk right", camera="static")
    times = [event.time_s for event in scene.events]
    places = joints(scene.body, np.linspace(times[0], times[1], 30))
    feet = places[:, [JOINTS.index("left foot"), JOINTS.index("right foot")]]
    travel = np.abs(feet[-1, :, 0] - feet[0, :, 0])
    assert travel.min() < 0.02 * travel.max()
    assert feet[..., 1] == pytest.approx(FLOOR_Y, abs=1e-9)


def test_ground_truth_follows_the_picture():
    scene = scene_of(4, world="v2", motion="roll right", camera="dolly in", background="brick")
    mask, track = object_mask(scene), body_track(scene)
    columns = (mask.sum(1) * (np.arange(64) + 0.5)).sum(1) / mask.sum((1, 2)) / 64
    assert track.x[5:18] == pytest.approx(columns[5:18], abs=0.02)
    assert track.radius[-1] > 1.3 * track.radius[0]
    inverse = depth(scene)
    assert inverse[:, 0].max() < inverse[:, -1].min()
    assert set(np.unique(edges(render(scene)))) <= {0, 255}
    walker = scene_of(5, world="v2", motion="walk left")
    assert walker.body.shape == FIGURE
    assert key_points(walker).shape == (25, len(JOINTS), 2)
    assert pose(walker).max() == 255


def words_of(table, what, but):
    return [phrase for word, phrases in table[what].items() if word != but for phrase in phrases]


@pytest.mark.parametrize("vocabulary", ["train", "held_out"])
def test_captions_never_name_another_colour_shape_or_direction(vocabulary):
    table = WORDS if vocabulary == "train" else HELD_OUT
    rng = np.random.default_rng(1)
    for _ in range(400):
        scene = sample_scene(rng)
        spoken = describe(scene, rng, vocabulary)
        text = f" {spoken.text.lower().replace('.', ' ').replace(',', ' ')} "
        # "Green meadow" and "metallic ringing" are not about the object's colour and shape.
        for phrase in [*table["background"][scene.background], *sum(table["sound"].values(), ())]:
            text = text.replace(phrase, "")
        for what in ("colour", "shape", "size"):
            truth = getattr(scene.body, what)
            own = table[what][truth]
            false = [w for w in words_of(table, what, truth) if f" {w} " in text]
            assert not [w for w in false if not any(w in phrase for phrase in own)], text
            if what in spoken.stated:
                assert any(phrase in text for phrase in own), text
        if scene.body.motion == "roll right":
            assert "leftwards" not in text
            assert "to the left " not in text
            assert "right to left" not in text
        if "motion" in spoken.stated and scene.body.motion == "roll left":
            assert "left" in text


def test_training_captions_share_no_colour_word_with_the_held_out_ones():
    trained = {word for phrases in WORDS["colour"].values() for p in phrases for word in p.split()}
    held = {word for phrases in HELD_OUT["colour"].values() for p in phrases for word in p.split()}
    assert not trained & held


def test_every_motion_and_shape_is_drawn():
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng) for _ in range(300)]
    assert {s.body.motion for s in scenes} == set(MOTIONS)
    assert {s.body.shape for s in scenes} == set(SHAPES)
