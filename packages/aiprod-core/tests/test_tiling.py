"""Tiles cover their axis, blend to one, and give what the whole clip would give."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiprod_core.errors import InputError
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_core.tiling import (
    ByCount,
    BySize,
    Interval,
    Tiling,
    blend_weights,
    decode_chunks,
    default_tiling,
    encode_tiled,
    intervals,
    space_spans,
    split_by_count,
    split_by_size,
    start_earlier,
    time_spans,
    trapezoid,
)
from aiprod_core.types import ScaleFactors

# 2 frames and 4 x 4 pixels a latent; a frame sees 3 latents to each side.
CONFIG = VideoVAEConfig.from_metadata(
    {
        "latent_channels": 4,
        "patch_size": 2,
        "encoder_base_channels": 8,
        "decoder_base_channels": 8,
        "timestep_conditioning": False,
        "spatial_padding_mode": "zeros",
        "encoder_blocks": [["compress_all_res", {"multiplier": 1}]],
        "decoder_blocks": [["compress_all", {"multiplier": 1}]],
    }
)


@pytest.fixture
def decoder() -> VideoDecoder:
    torch.manual_seed(0)
    return VideoDecoder(CONFIG).eval().requires_grad_(False)


def decode(decoder: VideoDecoder, latent: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    return torch.cat(list(decode_chunks(decoder, latent, tiling)), dim=2)


@given(
    length=st.integers(1, 60), size=st.integers(1, 20), overlap=st.integers(0, 19), least=st.just(2)
)
def test_tiles_by_size_cover_the_axis_in_order_and_none_is_longer(
    length: int, size: int, overlap: int, least: int
) -> None:
    overlap = min(overlap, size - 1)
    tiles = split_by_size(length, size, overlap)
    assert_covers(tiles, length)
    assert all(tile.end - tile.start <= size for tile in tiles)
    if size >= least and length >= least:
        grown = split_by_size(length, size, overlap, least)
        assert_covers(grown, length)
        assert all(least <= tile.end - tile.start <= size for tile in grown)


@given(length=st.integers(1, 60), count=st.integers(1, 6), overlap=st.integers(0, 3))
def test_tiles_by_count_are_as_many_as_asked_and_equal_within_one(
    length: int, count: int, overlap: int
) -> None:
    if count > 1 and (length + overlap * (count - 1)) // count <= overlap:
        with pytest.raises(InputError, match="fewer tiles"):
            split_by_count(length, count, overlap)
        return
    tiles = split_by_count(length, count, overlap)
    assert_covers(tiles, length)
    sizes = [tile.end - tile.start for tile in tiles]
    assert len(tiles) == count
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(length=st.integers(2, 40), size=st.integers(2, 12), overlap=st.integers(0, 11))
def test_weights_sum_to_one_at_every_pixel_and_frame(length: int, size: int, overlap: int) -> None:
    tiling = BySize(size * 4, min(overlap, size - 1) * 4)
    for spans, covered in (
        (space_spans(tiling, length, 4), length * 4),
        (time_spans(tiling, length, 4), (length - 1) * 4 + 1),
    ):
        total = torch.zeros(covered)
        for span in spans:
            total[span.pixels] += span.weights
        torch.testing.assert_close(total, torch.ones(covered))


def test_a_later_tile_in_time_starts_a_latent_earlier_and_does_not_use_its_first_frame() -> None:
    tiles = start_earlier(split_by_size(11, 4, 2))
    assert tiles[:2] == [Interval(0, 4, 0, 2), Interval(1, 6, 3, 2)]
    spans = time_spans(BySize(32, 16), 11, 8)
    assert spans[1].pixels == slice(8, 41)
    assert spans[1].weights[0] == 0


def test_a_short_last_tile_grows_to_the_left_and_fades_over_all_it_shares() -> None:
    assert split_by_size(10, 5, 1, smallest=4)[-2:] == [Interval(4, 9, 1, 3), Interval(6, 10, 3, 0)]


def test_ramps_in_space_leave_out_zero_and_one() -> None:
    in_space = trapezoid(5, 1, 2, from_zero=False)
    assert in_space.tolist() == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3])
    in_time = trapezoid(5, 2, 0, from_zero=True)
    assert in_time.tolist() == pytest.approx([0, 1 / 2, 1, 1, 1])


def test_a_shorter_fade_leaves_the_surroundings_of_cuts_to_the_other_tile() -> None:
    whole, half = (blend_weights(split_by_size(16, 12, 8), fade=fade) for fade in (1.0, 0.5))
    assert torch.equal(half[0][4:6], torch.ones(2)) and not half[0][10:].any()
    assert not half[1][:2].any() and torch.equal(half[1][6:8], torch.ones(2))
    torch.testing.assert_close(half[0][4:] + half[1][:8], torch.ones(8))
    assert bool((half[0][6:10].diff() < whole[0][6:10].diff()).all())


def test_weights_of_tiles_that_overlap_by_more_than_half_still_sum_to_one() -> None:
    tiles = split_by_size(17, 12, 8)
    total = torch.zeros(17)
    for tile, weights in zip(tiles, blend_weights(tiles), strict=True):
        total[tile.start : tile.end] += weights
    torch.testing.assert_close(total, torch.ones(17))


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(frames=BySize(20, 6)),
        Tiling(height=BySize(40, 12), width=BySize(40, 12)),
        Tiling(width=ByCount(2, 6)),
        Tiling(BySize(20, 6), ByCount(2, 3), BySize(40, 12)),
    ],
    ids=["time only", "space only", "width only", "all"],
)
def test_tiles_decode_to_the_whole_where_no_cut_is_in_reach(
    decoder: VideoDecoder, tiling: Tiling
) -> None:
    latent = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    whole, tiled = decoder(latent), decode(decoder, latent, tiling)
    assert tiled.shape == whole.shape
    # conv_in and the block's convolution see one latent to each side, conv_out one patch.
    frames = out_of_reach([s.pixels for s in time_spans(tiling.frames, 16, 2)], reach=5)
    rows = out_of_reach([s.pixels for s in space_spans(tiling.height, 16, 4)], reach=10)
    columns = out_of_reach([s.pixels for s in space_spans(tiling.width, 16, 4)], reach=10)
    clear = frames[:, None, None] & rows[:, None] & columns
    error = (tiled - whole).abs().amax(dim=(0, 1))
    assert clear.float().mean() > 0.2
    assert error[clear].max() < 1e-5
    assert error[~clear].max() > 1e-3  # the tiles were real


def test_a_tile_of_the_whole_clip_changes_nothing(decoder: VideoDecoder) -> None:
    latent = torch.randn(1, 4, 3, 4, 4)
    tiling = Tiling(BySize(80, 24), BySize(768, 64), BySize(768, 64))
    torch.testing.assert_close(decode(decoder, latent, tiling), decoder(latent), atol=0, rtol=0)


def test_chunks_come_as_soon_as_no_later_tile_touches_them(decoder: VideoDecoder) -> None:
    latent = torch.randn(1, 4, 9, 2, 2)
    tiling = Tiling(frames=BySize(8, 2))
    calls: list[int] = []
    decoder.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[2]))
    chunks = decode_chunks(decoder, latent, tiling)
    assert next(chunks).shape[2] == 4  # up to where the second tile starts
    assert calls == [4]
    assert sum(chunk.shape[2] for chunk in chunks) == 17 - 4


def test_memory_of_a_long_clip_is_that_of_one_tile(decoder: VideoDecoder) -> None:
    decoded: list[int] = []
    decoder.register_forward_pre_hook(lambda _module, args: decoded.append(args[0].shape[2]))
    latent = torch.randn(1, 4, 60, 2, 2)
    frames = [c.shape[2] for c in decode_chunks(decoder, latent, Tiling(frames=BySize(8, 2)))]
    assert sum(frames) == 59 * 2 + 1
    assert max(frames) <= 9
    assert max(decoded) == 5  # four latents and the one before


def test_tiles_encode_to_the_whole_where_no_cut_is_in_reach() -> None:
    torch.manual_seed(0)
    encoder = VideoEncoder(CONFIG).eval().requires_grad_(False)
    pixels = torch.rand(1, 3, 41, 160, 8) * 2 - 1
    tiling = Tiling(frames=BySize(24, 16), height=BySize(96, 64))
    whole, tiled = encoder(pixels), encode_tiled(encoder, pixels, tiling)
    assert tiled.shape == whole.shape
    # Causal convolutions see two back: two latents by conv_out, four frames by those before it.
    frames = out_of_reach([s.latent for s in time_spans(tiling.frames, 21, 2)], reach=4)
    rows = out_of_reach([s.latent for s in space_spans(tiling.height, 40, 4)], reach=2)
    clear = frames[:, None] & rows
    error = (tiled - whole).abs().amax(dim=(0, 1, 4))
    assert clear.float().mean() > 0.1
    assert error[clear].max() < 1e-5
    assert error[~clear].max() > 1e-3


def test_encoding_leaves_out_frames_off_the_grid_in_tiles_too() -> None:
    encoder = VideoEncoder(CONFIG).eval()
    pixels = torch.rand(1, 3, 42, 8, 8)
    tiling = Tiling(frames=BySize(24, 16))
    tiled = encode_tiled(encoder, pixels, tiling)
    torch.testing.assert_close(tiled, encode_tiled(encoder, pixels[:, :, :41], tiling))


@pytest.mark.parametrize(
    ("tiling", "words"),
    [
        (Tiling(frames=BySize(24, 8)), "overlap by 16 or more in frames; got 8"),
        (Tiling(height=BySize(64, 32)), "overlap by 64 or more in height; got 32"),
        (Tiling(width=ByCount(2, 3)), "overlap by 64 or more in width; got 12"),
    ],
)
def test_overlaps_too_small_to_encode_are_refused_by_axis(tiling: Tiling, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encode_tiled(VideoEncoder(CONFIG), torch.rand(1, 3, 41, 160, 160), tiling)


def test_a_tile_off_the_grid_is_refused_before_anything_is_decoded(decoder: VideoDecoder) -> None:
    with pytest.raises(InputError, match=r"multiples of 4.* got 30 and 8, try 32 and 8"):
        decode_chunks(decoder, torch.randn(1, 4, 3, 16, 16), Tiling(height=BySize(30, 8)))
    with pytest.raises(InputError, match="below its size"):
        intervals(BySize(32, 32), 20, 4)


def test_default_tiles_keep_the_pictures_proportions_in_whole_latents() -> None:
    tiling = default_tiling(704, 1280, ScaleFactors(8, 32, 32))
    assert tiling == Tiling(BySize(80, 24), BySize(416, 64), BySize(768, 64))
    turned = default_tiling(1280, 704, ScaleFactors(8, 32, 32))
    assert (turned.height, turned.width) == (tiling.width, tiling.height)


@given(height=st.integers(1, 64), width=st.integers(1, 64), factor=st.sampled_from([4, 8, 16, 32]))
def test_default_tiles_fit_any_grid(height: int, width: int, factor: int) -> None:
    scale = ScaleFactors(4, factor, factor)
    tiling = default_tiling(height * factor, width * factor, scale)
    for axis, length in ((tiling.height, height), (tiling.width, width), (tiling.frames, 30)):
        assert_covers(intervals(axis, length, 4 if axis is tiling.frames else factor), length)


def assert_covers(tiles: list[Interval], length: int) -> None:
    """In order, from 0 to the end, each sharing with its neighbour exactly what it fades over."""
    assert tiles[0].start == tiles[0].left_ramp == tiles[-1].right_ramp == 0
    assert tiles[-1].end == length
    for before, after in pairwise(tiles):
        assert before.start < after.start <= before.end < after.end
        assert before.right_ramp == after.left_ramp == before.end - after.start


def out_of_reach(tiles: list[slice], reach: int) -> torch.Tensor:
    """True at positions at least `reach` from the cut ends of every tile that covers them."""
    length = tiles[-1].stop
    clear = torch.ones(length, dtype=torch.bool)
    for tile in tiles:
        if tile.start > 0:
            clear[tile.start : tile.start + reach] = False
        if tile.stop < length:
            clear[tile.stop - reach : tile.stop] = False
    return clear
