import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiprod_core.components.dfr import canvas_for, doubled_frames, temporal_tiles
from aiprod_core.errors import InputError

CLIP_LENGTHS = st.integers(1, 80).map(lambda k: 8 * k + 1)


def test_the_segment_that_pads_least_is_chosen_and_ties_take_the_longer():
    assert (canvas_for(121).num_frames, canvas_for(121).segment) == (121, 24)
    assert (canvas_for(129).num_frames, canvas_for(129).segment) == (129, 32)
    assert (canvas_for(97).num_frames, canvas_for(97).segment) == (97, 32)
    assert canvas_for(9).positions == (24,)


def test_a_single_frame_has_no_segment():
    with pytest.raises(InputError, match="at least 2"):
        canvas_for(1)


@given(CLIP_LENGTHS)
def test_the_canvas_holds_the_clip_and_ends_on_a_keyframe(num_frames):
    canvas = canvas_for(num_frames)
    assert 0 <= canvas.num_frames - num_frames < 24
    assert canvas.positions[-1] == canvas.num_frames - 1
    assert all(position % canvas.segment == 0 for position in canvas.positions)


@given(CLIP_LENGTHS, st.integers(1, 4))
def test_joined_tiles_cover_every_latent_frame_once(num_frames, count):
    canvas = canvas_for(num_frames).doubled()
    covered = []
    for tile in temporal_tiles(canvas.positions, count):
        covered += range(tile.latent_start + tile.drop_latents, tile.latent_end)
    assert covered == list(range((canvas.num_frames - 1) // 8 + 1))


@given(CLIP_LENGTHS, st.integers(1, 4))
def test_the_slots_of_all_tiles_are_the_middles_of_the_segments(num_frames, count):
    canvas = canvas_for(num_frames).doubled()
    tiles = temporal_tiles(canvas.positions, count)
    slots = {slot for tile in tiles for slot in tile.slots}
    after = canvas.with_midpoints()
    assert slots | set(canvas.positions) == set(after.positions)
    assert after.segment == canvas_for(num_frames).segment
    assert all(tile.start < slot < tile.end for tile in tiles for slot in tile.slots)


def test_two_rounds_keep_the_segment_and_quadruple_the_time():
    canvas = canvas_for(97)
    twice = canvas.doubled().with_midpoints().doubled().with_midpoints()
    assert twice.num_frames == (97 - 1) * 4 + 1 == doubled_frames(doubled_frames(97))
    assert twice.positions == tuple(range(32, 385, 32))


def test_later_tiles_start_one_segment_early_and_drop_it_with_the_seam():
    first, second = temporal_tiles((48, 96, 144, 192, 240), 2)
    assert (first.start, first.end, first.drop_latents) == (0, 144, 0)
    assert (second.start, second.end, second.drop_latents) == (96, 240, 7)
    assert second.anchors == (96, 144, 192, 240)
    assert second.slots == (120, 168, 216)
