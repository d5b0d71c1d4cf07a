"""The video VAE and the upsamplers against the port in diffusers, with the same random weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_core.model.upsampler import LatentUpsampler, UpsamplerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_core.parity.diffusers_peers import DECODER_RULES, encoder_rules, ruled

diffusers = pytest.importorskip("diffusers")

ENCODER_KEYS = encoder_rules(4)

SPATIAL, TEMPORAL, BOTH = "spatial", "temporal", "spatiotemporal"
ENCODER = [
    ["res_x", 2],
    ["compress_space_res", {"multiplier": 2}],
    ["res_x", 1],
    ["compress_time_res", {"multiplier": 2}],
    ["res_x", 1],
    ["compress_all_res", {"multiplier": 2}],
    ["res_x", 1],
    ["compress_all_res", {"multiplier": 1}],
    ["res_x", {"num_layers": 1}],
]
COMMON = {
    "latent_channels": 8,
    "encoder_base_channels": 8,
    "decoder_base_channels": 4,
    "encoder_blocks": ENCODER,
}
COMMON_THEIRS = {
    "latent_channels": 8,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": (2, 1, 1, 1, 1),
    "decoder_causal": False,
}
# 2.0: three residual compress_all, encoder padded by zeros and decoder by reflection.
OURS_2_0 = COMMON | {
    "timestep_conditioning": False,
    "decoder_blocks": [
        ["res_x", 2],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", 1],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", 1],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", 1],
    ],
}
THEIRS_2_0 = COMMON_THEIRS | {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (2, 1, 1, 1),
}
# 2.3: one axis at a time, no shortcuts, zeros on both sides.
OURS_2_3 = COMMON | {
    "timestep_conditioning": False,
    "spatial_padding_mode": "zeros",
    "decoder_blocks": [
        ["res_x", 2],
        ["compress_space", {"multiplier": 2}],
        ["res_x", 1],
        ["compress_time", {"multiplier": 2}],
        ["res_x", 1],
        ["compress_all", {"multiplier": 1}],
        ["res_x", 1],
        ["compress_all", {"multiplier": 2}],
        ["res_x", 1],
    ],
}
THEIRS_2_3 = COMMON_THEIRS | {
    "decoder_block_out_channels": (8, 16, 16, 32),
    "decoder_layers_per_block": (2, 1, 1, 1, 1),
    "decoder_spatio_temporal_scaling": (True,) * 4,
    "decoder_inject_noise": (False,) * 5,
    "upsample_type": (BOTH, BOTH, TEMPORAL, SPATIAL),
    "upsample_residual": (False,) * 4,
    "upsample_factor": (2, 2, 1, 2),
    "decoder_spatial_padding_mode": "zeros",
}


@pytest.mark.parametrize(
    ("ours", "theirs"), [(OURS_2_0, THEIRS_2_0), (OURS_2_3, THEIRS_2_3)], ids=["2.0", "2.3"]
)
def test_encoding_and_decoding_agree_with_diffusers(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    peer = peer_vae(theirs)
    config = VideoVAEConfig.from_metadata(ours)
    encoder, decoder = VideoEncoder(config).eval(), VideoDecoder(config).eval()
    carry(peer.encoder, encoder, ENCODER_KEYS)
    carry(peer.decoder, decoder, DECODER_RULES)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 9, 64, 64, generator=generator) * 2 - 1
    latent = torch.randn(1, 8, 2, 2, 3, generator=generator)
    with torch.no_grad():
        mean, logvar = encoder.moments(pixels)
        expected = peer.encode(pixels).latent_dist
        torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=1e-5)
        assert logvar is not None
        torch.testing.assert_close(logvar, expected.logvar[:, :1], atol=1e-5, rtol=1e-5)
        decoded = peer.decode(latent, causal=False).sample
        torch.testing.assert_close(decoder(latent), decoded, atol=2e-5, rtol=2e-5)


def test_a_timestep_conditioned_decoder_with_injected_noise_agrees_with_diffusers() -> None:
    blocks = [
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", {"num_layers": 2, "inject_noise": True}],
    ]
    ours = COMMON | {"timestep_conditioning": True, "decoder_blocks": blocks}
    theirs = COMMON_THEIRS | {
        "timestep_conditioning": True,
        "decoder_block_out_channels": (8,),
        "decoder_layers_per_block": (1, 2),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, True),
        "upsample_type": (BOTH,),
        "upsample_residual": (True,),
        "upsample_factor": (2,),
    }
    peer = peer_vae(theirs)
    decoder = VideoDecoder(VideoVAEConfig.from_metadata(ours)).eval()
    carry(peer.decoder, decoder, DECODER_RULES)
    latent = torch.randn(1, 8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([0.3])
    # Their pipelines add noise to the latent before the decoder, ours inside it: give it zeros.
    torch.manual_seed(1)
    maps = [torch.randn(3, 3) for _ in range(4)]  # two convolutions in each of two blocks
    with torch.no_grad():
        torch.manual_seed(1)
        expected = peer.decode(0.975 * latent, temb=timestep, causal=False).sample
        got = decoder(latent, timestep=timestep, noise=[torch.zeros_like(latent), *maps])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"use_rational_resampler": False}),
        ({"rational_resampler": True}, {}),
        ({"rational_resampler": True, "spatial_scale": 1.5}, {"rational_spatial_scale": 1.5}),
        ({"rational_resampler": True, "spatial_scale": 0.75}, {"rational_spatial_scale": 0.75}),
        ({"rational_resampler": True, "spatial_scale": 4.0}, {"rational_spatial_scale": 4.0}),
        (
            {"spatial_upsample": False, "temporal_upsample": True},
            {"spatial_upsample": False, "temporal_upsample": True},
        ),
        ({"temporal_upsample": True}, {"temporal_upsample": True}),
    ],
    ids=["x2", "rational x2", "x1.5", "x0.75", "x4", "temporal", "spatiotemporal"],
)
def test_upsampling_agrees_with_diffusers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    sizes = {"in_channels": 8, "mid_channels": 32, "num_blocks_per_stage": 1}
    peer = LTX2LatentUpsamplerModel(**sizes, **theirs).eval()
    randomise(peer)
    upsampler = LatentUpsampler(UpsamplerConfig.from_metadata(sizes | ours)).eval()
    carry(peer, upsampler, ())
    latent = torch.randn(2, 8, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(upsampler(latent), peer(latent), atol=1e-5, rtol=1e-5)


def peer_vae(config: dict[str, Any]) -> Any:
    peer = diffusers.AutoencoderKLLTX2Video(**config).eval()
    randomise(peer)
    return peer


def randomise(module: nn.Module) -> None:
    """Makes every parameter count: fresh ones start some tables and scales at zero or one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 0:
                continue  # the timestep's scale, 1000
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def carry(peer: nn.Module, module: nn.Module, keys: tuple[Any, ...]) -> None:
    """Loads the peer's weights under our names; ours must all be there, but for the statistics."""
    state: dict[str, Tensor] = {}
    for name, tensor in peer.state_dict().items():
        state[ruled(name, keys)] = tensor
    result = module.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("per_channel_statistics.") for name in result.missing_keys)
