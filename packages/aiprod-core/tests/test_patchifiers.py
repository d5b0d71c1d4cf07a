"""Tokens, grids and times."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_core.components import patchifiers
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.types import AudioLatentShape, ScaleFactors, VideoLatentShape

SCALE = ScaleFactors(8, 32, 32)
size = st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(batch=size, channels=size, frames=size, rows=size, columns=size, patch=st.integers(1, 3))
def test_unpatchify_undoes_patchify(batch, channels, frames, rows, columns, patch) -> None:
    shape = VideoLatentShape(batch, channels, frames, rows * patch, columns * patch)
    latent = torch.randn(shape)
    tokens = patchifiers.patchify_video(latent, patch)
    assert tokens.shape == (batch, frames * rows * columns, channels * patch**2)
    assert torch.equal(patchifiers.unpatchify_video(tokens, shape, patch), latent)


@settings(max_examples=20, deadline=None)
@given(batch=size, channels=size, frames=size, bins=size)
def test_unpatchify_audio_undoes_patchify_audio(batch, channels, frames, bins) -> None:
    latent = torch.randn(batch, channels, frames, bins)
    tokens = patchifiers.patchify_audio(latent)
    assert torch.equal(patchifiers.unpatchify_audio(tokens, bins), latent)


def test_tokens_run_over_columns_then_rows_then_frames() -> None:
    shape = VideoLatentShape(1, 2, 3, 4, 5)
    tokens = patchifiers.patchify_video(torch.randn(shape) * 0 + torch.arange(60.0).view(3, 4, 5))
    assert tokens[0, :, 0].tolist() == list(range(60))


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 9), fps=st.sampled_from([24.0, 25.0, 29.97, 50.0]))
def test_time_intervals_tile_the_clip_without_gaps(frames: int, fps: float) -> None:
    grid = VideoGrid(VideoLatentShape(1, 1, frames, 2, 3), SCALE, fps)
    time = grid.positions()[0, 0]
    starts, ends = time[:: grid.tokens_per_frame, 0], time[:: grid.tokens_per_frame, 1]
    assert starts[0] == 0
    torch.testing.assert_close(starts[1:], ends[:-1])
    torch.testing.assert_close(ends[0].item(), 1 / fps)
    torch.testing.assert_close(ends[-1].item(), ((frames - 1) * 8 + 1) / fps)


def test_positions_with_patches_cover_the_same_area() -> None:
    shape = VideoLatentShape(2, 1, 2, 4, 6)
    whole, patched = (VideoGrid(shape, SCALE, 24.0, patch).positions() for patch in (1, 2))
    assert patched.shape == (2, 3, 2 * 2 * 3, 2)
    torch.testing.assert_close(patched[..., 1].amax(dim=2), whole[..., 1].amax(dim=2))


def test_audio_times_follow_each_other_at_25_a_second() -> None:
    times = AudioGrid(AudioLatentShape(1, 8, 26, 16)).positions()[0, 0]
    torch.testing.assert_close(times[1:, 0], times[:-1, 1])
    torch.testing.assert_close(times[-1].tolist(), [0.97, 1.01])


def test_tokens_appended_to_a_clip_are_left_out_of_its_latent() -> None:
    grid = VideoGrid(VideoLatentShape(1, 3, 2, 2, 2), SCALE, 24.0)
    latent = torch.randn(grid.shape)
    tokens = torch.cat((grid.patchify(latent), torch.randn(1, 5, 3)), dim=1)
    assert torch.equal(grid.unpatchify(tokens), latent)


@settings(deadline=None)
@given(num_frames=st.integers(1, 2000), time_scale=st.sampled_from([4, 8]))
def test_snapping_gives_the_largest_length_on_the_grid(num_frames: int, time_scale: int) -> None:
    snapped = patchifiers.snap_num_frames(num_frames, time_scale)
    assert (snapped - 1) % time_scale == 0
    assert snapped <= num_frames < snapped + time_scale


def test_slots_split_a_clip_evenly() -> None:
    assert patchifiers.slot_frames(3, 121) == [30, 60, 90]
    assert patchifiers.slot_frames(0, 121) == []
