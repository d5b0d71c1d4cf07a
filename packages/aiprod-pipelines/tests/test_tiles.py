"""Tiles are as large as memory allows, on the VAE's grid, and refused where they cannot be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiprod_core.errors import InputError
from aiprod_core.model.video_vae import VideoDecoder, VideoVAEConfig
from aiprod_core.tiling import BySize, Tiling, decode_chunks, intervals
from aiprod_core.types import ScaleFactors
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.tiles import choose_tiling, decode_bytes, decoder_spread, free_memory

LTX = VideoVAEConfig.from_metadata(
    {
        "latent_channels": 128,
        "decoder_base_channels": 128,
        "encoder_blocks": [],
        "decoder_blocks": [["compress_all", {"residual": True, "multiplier": 2}]] * 3,
    }
)
SCALE = ScaleFactors(8, 32, 32)
GIB = 2**30


def choose(spec: str, size=(121, 1024, 1536), free: float = 1e15, **options) -> Tiling:
    return choose_tiling(spec, LTX, SCALE, size, element_bytes=2, free_bytes=int(free), **options)


def test_with_memory_to_spare_only_time_is_tiled():
    assert choose("auto") == Tiling(frames=BySize(80, 24), fade=0.5)
    assert choose("auto", (10_001, 1024, 1536)) == choose("auto")


def test_streaming_cuts_time_shorter_for_an_early_first_frame():
    assert choose("auto", is_streamed=True).frames == BySize(48, 24)


def test_off_is_the_whole_clip_and_a_size_is_taken_as_given():
    assert choose("off") == Tiling()
    chosen = choose("768x256x64")
    assert (chosen.frames, chosen.height) == (BySize(64, 24), BySize(256, 64))
    assert chosen.width == BySize(768, 128)  # as far as this decoder sees: four latents
    small = choose("64x64x16")
    assert (small.frames, small.height, small.width) == (
        BySize(16, 8), BySize(64, 32), BySize(64, 32)
    )  # fmt: skip


def test_a_decoder_with_more_convolutions_sees_further_and_plain_means_spread_as_foretold():
    blocks = [["res_x", {"num_layers": 2}], ["compress_all", {}], ["res_x", {"num_layers": 1}]]
    config = VideoVAEConfig.from_metadata(
        {"encoder_blocks": [], "decoder_blocks": blocks, "patch_size": 2}
    )
    # Steps of a whole latent: the first, two of the last block's, the one that doubles; of half a
    # latent: four of the first block's, and the last.
    kernel = torch.ones(3) / 3
    wave = torch.zeros(1, 1, 64).index_fill(2, torch.tensor(32), 1.0)
    for step in (2, 2, 2, 2, 1, 1, 1, 1, 1):  # in half latents
        wave = torch.nn.functional.conv1d(wave, kernel[None, None], dilation=step, padding=step)
    offsets = (torch.arange(64) - 32) / 2
    deviation = float((wave[0, 0] * offsets.square()).sum().sqrt())
    assert decoder_spread(config) == pytest.approx((deviation,) * 3, rel=1e-4)
    assert decoder_spread(LTX) < decoder_spread(config)


@torch.inference_mode()
def test_nanos_tiles_decode_within_45_db_of_the_whole():
    """In width at the smallest tile that is chosen by itself, and in time as streams are cut."""
    models = ModelSet.open("nano", device="cpu")
    for size, spec in (((5, 64, 448), "256x64x80"), ((49, 64, 64), "64x64x24")):
        frames, _, width = size
        t, y, x = (g.float() for g in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
        ball = ((x - 20 - (width - 40) * t / frames) ** 2 + (y - 30) ** 2 < 200).float()
        red, grey = 0.2 + 0.6 * ball, 0.3 + 0.3 * x / width - 0.2 * ball
        pixels = (torch.stack([red, grey, grey])[None] * 2 - 1).to(models.dtype)
        with models.video_encoder() as encoder, models.video_decoder() as decoder:
            latent = encoder(pixels)
            tiling = choose_tiling(
                spec, decoder.config, decoder.scale, size, element_bytes=4, free_bytes=0
            )
            whole, tiled = (
                torch.cat(list(decode_chunks(decoder, latent, tiles)), dim=2).clamp(-1, 1)
                for tiles in (Tiling(), tiling)
            )
        error = (whole - tiled).square().mean()
        assert error > 0
        assert 10 * torch.log10(4 / error) >= 45


@given(
    st.floats(0.01, 200), st.sampled_from([(1024, 1536), (1536, 1024), (704, 1280), (2176, 3840)])
)
def test_less_memory_never_gives_larger_tiles_and_what_fits_is_within_it(free_gib: float, sides):
    size = (241, *sides)

    def needed(tiling: Tiling) -> int:
        sides = [
            whole if axis is None else min(whole, axis.size)
            for axis, whole in zip((tiling.height, tiling.width), size[1:], strict=True)
        ]
        return decode_bytes(LTX, tiling.frames.size + 8, *sides, 2)

    tiling = choose("auto", size, free_gib * GIB)
    smaller = choose("auto", size, free_gib * GIB / 2)
    assert needed(smaller) <= needed(tiling)
    smallest = needed(choose("auto", size, 0))
    assert needed(tiling) <= max(smallest, free_gib * GIB)
    for axis, whole, factor in zip((tiling.height, tiling.width), size[1:], SCALE[1:], strict=True):
        intervals(axis, whole // factor, factor)  # on the grid: raises where it is not


def test_the_estimate_grows_with_the_pixels_and_the_width_of_the_type():
    base = decode_bytes(LTX, 80, 512, 512, 2)
    assert decode_bytes(LTX, 160, 512, 512, 2) == 2 * base
    assert decode_bytes(LTX, 80, 512, 512, 4) == 2 * base
    assert 1e9 < base < 1e10  # a released decoder over 20 million pixels


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("500x512x80", "tile width must be a multiple of 32.*got 500, try 512"),
        ("512x512x8", "tile frames must be.*at least 16; got 8, try 16"),
    ],
)
def test_a_tile_that_cannot_be_is_refused_with_the_nearest_that_can(spec: str, message: str):
    with pytest.raises(InputError, match=message):
        choose(spec)


@pytest.mark.parametrize("spec", ["big", "512x512", "0x64x16", "512x512x80x1"])
def test_a_request_takes_auto_off_or_three_numbers(spec: str):
    with pytest.raises(InputError, match=f'got "{spec}", try 768x768x80'):
        GenerationRequest("a ball", tile=spec)


def test_free_memory_is_a_sensible_number_of_bytes():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


# 4 frames and 8 x 8 pixels a latent.
SMOOTH = VideoVAEConfig.from_metadata(
    {
        "latent_channels": 4,
        "patch_size": 4,
        "decoder_base_channels": 8,
        "timestep_conditioning": False,
        "spatial_padding_mode": "zeros",
        "encoder_blocks": [],
        "decoder_blocks": [["compress_all", {"multiplier": 2}], ["compress_time", {}]],
    }
)


@pytest.fixture(scope="module")
def smooth_decoder() -> VideoDecoder:
    """Random, but what it shows of a latent fades with distance, as in a trained decoder."""
    torch.manual_seed(0)
    decoder = VideoDecoder(SMOOTH).eval().requires_grad_(False)
    for name, weight in decoder.named_parameters():
        if weight.ndim == 5:
            assert weight.shape[2:] == (3, 3, 3), name
            centre = weight[:, :, 1, 1, 1].clone()
            weight *= 0.1
            weight[:, :, 1, 1, 1] = centre
    return decoder


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10((b.max() - b.min()) ** 2 / (a - b).square().mean()))


@pytest.mark.parametrize("spec", ["auto", "64x48x32"])
def test_tiled_decoding_of_a_smooth_decoder_is_within_45_db_of_whole(
    spec: str, smooth_decoder: VideoDecoder
):
    torch.manual_seed(1)
    latent = torch.randn(1, 4, 22, 8, 10)
    whole = smooth_decoder(latent)
    options = {"size": tuple(whole.shape[2:]), "element_bytes": 4, "free_bytes": GIB}
    tiling = choose_tiling(spec, SMOOTH, smooth_decoder.scale, **options)
    parts = list(decode_chunks(smooth_decoder, latent, tiling))
    assert len(parts) > 1
    assert psnr(torch.cat(parts, dim=2), whole) > 45
