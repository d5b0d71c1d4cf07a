"""The video VAE: its grid, its causality, its config and its options."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import load_video_decoder, load_video_encoder
from aiprod_core.model.conv_blocks import (
    DECODER_BLOCKS,
    ENCODER_BLOCKS,
    PADDING_MODES,
    VAEBlock,
    depth_to_space,
    patchify,
    space_to_depth,
    unpatchify,
)
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig

# 4 frames and 8 x 8 pixels a latent.
SECTION: dict[str, Any] = {
    "latent_channels": 6,
    "patch_size": 2,
    "encoder_base_channels": 8,
    "decoder_base_channels": 8,
    "timestep_conditioning": False,
    "spatial_padding_mode": "zeros",
    "encoder_blocks": [
        ["res_x", 1],
        ["compress_all_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 1}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["compress_all", {"multiplier": 1}],
    ],
}


def config(**changes: Any) -> VideoVAEConfig:
    return VideoVAEConfig.from_metadata(SECTION | changes)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("num_frames", "latents"), [(1, 1), (5, 2), (13, 4)])
def test_frames_and_pixels_become_latents_on_the_causal_grid_and_return(
    num_frames: int, latents: int
) -> None:
    pixels = torch.rand(2, 3, num_frames, 16, 24)
    latent = VideoEncoder(config())(pixels)
    assert latent.shape == (2, 6, latents, 2, 3)
    assert VideoDecoder(config())(latent).shape == pixels.shape


def test_the_factors_follow_from_the_block_list() -> None:
    assert config().scale == (4, 8, 8)
    blocks = [["compress_space_res", {}], ["compress_time_res", {}], ["compress_all_x_y", {}]]
    assert config(encoder_blocks=blocks, patch_size=4).scale == (4, 16, 16)


def test_frames_off_the_grid_are_left_out_at_the_end() -> None:
    encoder = VideoEncoder(config())
    pixels = torch.rand(1, 3, 8, 16, 16)
    torch.testing.assert_close(encoder(pixels), encoder(pixels[:, :, :5]))


def test_an_earlier_latent_does_not_see_a_later_frame() -> None:
    encoder = VideoEncoder(config())
    pixels = torch.rand(1, 3, 9, 16, 16)
    changed = pixels.clone()
    changed[:, :, 5:] += 1
    before, after = encoder(pixels), encoder(changed)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 2], after[:, :, 2], atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_only_a_causal_decoder_keeps_earlier_frames_when_a_later_latent_changes(
    causal: bool,
) -> None:
    decoder = VideoDecoder(config(causal_decoder=causal))
    latent = torch.randn(1, 6, 3, 2, 2)
    changed = latent.clone()
    changed[:, :, 2] += 1
    before, after = decoder(latent), decoder(changed)
    same = torch.allclose(before[:, :, :5], after[:, :, :5], atol=1e-6)
    assert same is causal


def test_an_image_encodes_like_the_first_frame_of_a_clip() -> None:
    encoder = VideoEncoder(config())
    pixels = torch.rand(1, 3, 9, 16, 16)
    torch.testing.assert_close(encoder(pixels[:, :, :1]), encoder(pixels)[:, :, :1])


def test_the_encoder_normalises_by_the_statistics_and_the_decoder_undoes_it() -> None:
    encoder, decoder = VideoEncoder(config()), VideoDecoder(config())
    pixels = torch.rand(1, 3, 5, 16, 16)
    mean, _ = encoder.moments(pixels)
    plain = decoder(mean)
    for network in (encoder, decoder):
        network.per_channel_statistics.get_buffer("mean-of-means").fill_(0.5)
        network.per_channel_statistics.get_buffer("std-of-means").fill_(2.0)
    torch.testing.assert_close(encoder(pixels), (mean - 0.5) / 2)
    torch.testing.assert_close(decoder(encoder(pixels)), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "outputs", "learnt"),
    [("uniform", 7, 1), ("per_channel", 12, 6), ("constant", 7, None), ("none", 6, None)],
)
def test_the_log_variance_has_the_channels_its_mode_says(
    mode: str, outputs: int, learnt: int | None
) -> None:
    encoder = VideoEncoder(config(latent_log_var=mode))
    mean, logvar = encoder.moments(torch.rand(1, 3, 1, 16, 16))
    assert encoder.conv_out.conv.out_channels == outputs
    assert mean.shape[1] == 6
    assert (logvar.shape[1] if logvar is not None else None) == learnt


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_padding_matches_a_convolution_over_a_clip_padded_by_hand(mode: str) -> None:
    encoder = VideoEncoder(config(spatial_padding_mode=mode))
    x = torch.rand(1, 12, 3, 4, 5)
    in_time = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
    pad = "constant" if mode == "zeros" else mode
    by_hand = torch.nn.functional.pad(in_time.flatten(0, 1), (1, 1, 1, 1), mode=pad)
    conv = encoder.conv_in.conv
    expected = torch.nn.functional.conv3d(by_hand[None], conv.weight, conv.bias)
    torch.testing.assert_close(encoder.conv_in(x), expected, atol=1e-5, rtol=1e-5)


def test_without_its_key_the_encoder_pads_with_zeros_and_the_decoder_by_reflection() -> None:
    absent = {key: value for key, value in SECTION.items() if key != "spatial_padding_mode"}
    read = VideoVAEConfig.from_metadata(absent)
    assert (read.encoder_padding_mode, read.decoder_padding_mode) == ("zeros", "reflect")
    read = VideoVAEConfig.from_metadata(absent | {"encoder_spatial_padding_mode": "circular"})
    assert (read.encoder_padding_mode, read.decoder_padding_mode) == ("circular", "reflect")


def test_reflection_of_a_single_latent_row_is_refused_in_words() -> None:
    decoder = VideoDecoder(config(spatial_padding_mode="reflect"))
    with pytest.raises(InputError, match="at least 2 latents"):
        decoder(torch.randn(1, 6, 1, 1, 3))


def test_pixels_off_the_grid_are_refused_in_words() -> None:
    with pytest.raises(InputError, match="multiples of 8 and 8; got 20 and 16"):
        VideoEncoder(config())(torch.rand(1, 3, 1, 20, 16))


def test_a_conditioned_decoder_depends_on_its_timestep_and_repeats_with_its_seed() -> None:
    decoder = VideoDecoder(config(timestep_conditioning=True))
    latent = torch.randn(1, 6, 2, 2, 2)

    def decode(seed: int, timestep: float | None = None) -> torch.Tensor:
        time = None if timestep is None else torch.tensor([timestep])
        generator = torch.Generator().manual_seed(seed)
        return decoder(latent, timestep=time, generator=generator)

    torch.testing.assert_close(decode(0), decode(0, 0.05))
    assert not torch.allclose(decode(0), decode(1), atol=1e-5)
    assert not torch.allclose(decode(0), decode(0, 0.5), atol=1e-4)


def test_injected_noise_is_one_map_for_all_channels_and_frames() -> None:
    blocks = [["res_x", {"num_layers": 1, "inject_noise": True}], *SECTION["decoder_blocks"][1:]]
    decoder = VideoDecoder(config(decoder_blocks=blocks))
    block = decoder.up_blocks[-1].get_submodule("res_blocks.0")
    torch.nn.init.ones_(block.get_parameter("per_channel_scale2"))
    noise = [torch.zeros(8, 8), torch.randn(8, 8)]
    seen = []
    block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    latent = torch.randn(1, 6, 2, 2, 2)
    decoder(latent, noise=noise)
    decoder(latent, noise=[torch.zeros(8, 8)] * 2)
    torch.testing.assert_close(seen[0] - seen[1], noise[1].expand_as(seen[0]), atol=1e-5, rtol=0)


def test_attention_looks_within_a_frame_only() -> None:
    decoder = VideoDecoder(config(decoder_blocks=[["attn", {}], ["compress_all", {}]]))
    attention = decoder.up_blocks[1]
    x = torch.randn(1, 8, 3, 4, 4)
    changed = x.clone()
    changed[:, :, 1, 0, 0] += 1
    difference = (attention(x) - attention(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert difference[1] > 1e-4
    assert difference[0] == difference[2] == 0


BLOCKS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 9),
        "multiplier": st.integers(1, 4),
        "residual": st.booleans(),
    }
)


@given(
    encoder=st.lists(st.tuples(st.sampled_from(ENCODER_BLOCKS), BLOCKS), min_size=1, max_size=4),
    decoder=st.lists(st.tuples(st.sampled_from(DECODER_BLOCKS), BLOCKS), min_size=1, max_size=4),
    encoder_padding=st.sampled_from(PADDING_MODES),
    is_causal=st.booleans(),
    is_conditioned=st.booleans(),
)
def test_a_config_survives_its_metadata(
    encoder: list[Any],
    decoder: list[Any],
    encoder_padding: Any,
    is_causal: bool,
    is_conditioned: bool,
) -> None:
    written = VideoVAEConfig(
        encoder_blocks=tuple(VAEBlock(name, **settings) for name, settings in encoder),
        decoder_blocks=tuple(VAEBlock(name, **settings) for name, settings in decoder),
        encoder_padding_mode=encoder_padding,
        causal_decoder=is_causal,
        timestep_conditioning=is_conditioned,
    )
    assert VideoVAEConfig.from_metadata(written.to_metadata()) == written
    everywhere = replace(written, decoder_padding_mode=encoder_padding)
    assert VideoVAEConfig.from_metadata(everywhere.to_metadata()) == everywhere


def test_padding_modes_without_published_keys_are_refused_when_written() -> None:
    odd = replace(config(), encoder_padding_mode="zeros", decoder_padding_mode="circular")
    with pytest.raises(InputError, match="no published keys"):
        odd.to_metadata()


def test_published_defaults_apply_where_keys_are_absent() -> None:
    read = VideoVAEConfig.from_metadata(
        {
            "encoder_blocks": [["compress_all_res", {}], ["compress_time", {}], ["res_x_y", {}]],
            "decoder_blocks": [["compress_all", {}], ["res_x_y", {}]],
        }
    )
    assert read.timestep_conditioning
    assert [block.multiplier for block in read.encoder_blocks] == [2, 1, 2]
    assert [block.multiplier for block in read.decoder_blocks] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_blocks": [["compress_depth", {}]]}, "encoder_blocks 'compress_depth'"),
        ({"decoder_blocks": [["compress_all_res", {}]]}, "decoder_blocks 'compress_all_res'"),
        ({"decoder_blocks": [["res_x", {"heads": 4}]]}, "decoder_blocks res_x: heads 4"),
        ({"decoder_blocks": ["res_x"]}, "decoder_blocks 'res_x'"),
        ({"norm_layer": "group_norm"}, "norm_layer 'group_norm'"),
        ({"latent_log_var": "shared"}, "latent_log_var 'shared'"),
        ({"spatial_padding_mode": "mirror"}, "padding mode 'mirror'"),
        ({"dims": 2}, "dims 2"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_key_and_value(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        config(**changes)


def test_widths_that_cannot_be_folded_are_refused_by_their_block() -> None:
    odd = config(encoder_base_channels=6, encoder_blocks=[["compress_all_res", {"multiplier": 1}]])
    with pytest.raises(CheckpointError, match="encoder_blocks cannot compress 6 channels to 6"):
        VideoEncoder(odd)


SMALL = st.integers(1, 3)


@settings(max_examples=25)
@given(p=SMALL, frames=SMALL, height=SMALL, width=SMALL)
def test_patches_unfold_to_the_pixels_they_were_folded_from(
    p: int, frames: int, height: int, width: int
) -> None:
    pixels = torch.randn(2, 3, frames, height * p, width * p)
    patches = patchify(pixels, p)
    assert patches.shape == (2, 3 * p * p, frames, height, width)
    assert torch.equal(unpatchify(patches, p), pixels)


@settings(max_examples=25)
@given(stride=st.tuples(SMALL, SMALL, SMALL), size=st.tuples(SMALL, SMALL, SMALL))
def test_depth_to_space_undoes_space_to_depth(
    stride: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    shape = [n * s for n, s in zip(size, stride, strict=True)]
    x = torch.randn(2, 3, *shape)
    assert torch.equal(depth_to_space(space_to_depth(x, stride), stride), x)


def test_a_patch_lists_its_columns_before_its_rows() -> None:
    pixels = torch.arange(4.0).reshape(1, 1, 1, 2, 2)  # [[0, 1], [2, 3]]
    assert patchify(pixels, 2).flatten().tolist() == [0, 2, 1, 3]


def test_gradients_reach_every_parameter_of_a_fresh_autoencoder() -> None:
    encoder, decoder = VideoEncoder(config()), VideoDecoder(config())
    mean, logvar = encoder.moments(torch.rand(1, 3, 5, 16, 16))
    assert logvar is not None
    decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).square().mean().backward()
    parameters = [*encoder.named_parameters(), *decoder.named_parameters()]
    assert [name for name, p in parameters if p.grad is None or not p.grad.abs().sum()] == []


def test_a_trained_autoencoder_written_with_published_names_loads_again(tmp_path: Path) -> None:
    encoder, decoder = VideoEncoder(config()).eval(), VideoDecoder(config()).eval()
    path = tmp_path / "vae.safetensors"
    save_checkpoint(
        path,
        [(key_maps.VIDEO_ENCODER, encoder), (key_maps.VIDEO_DECODER, decoder)],
        {"config": {"vae": config().to_metadata()}},
    )
    checkpoint = open_checkpoint(path)
    assert "vae.encoder.down_blocks.0.res_blocks.0.conv1.conv.weight" in checkpoint.tensors
    assert "vae.per_channel_statistics.std-of-means" in checkpoint.tensors
    pixels = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        latent = encoder(pixels)
        torch.testing.assert_close(load_video_encoder(checkpoint)(pixels), latent)
        torch.testing.assert_close(load_video_decoder(checkpoint)(latent), decoder(latent))
