"""The latent upsamplers: sizes, the statistics around them, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_core.errors import CheckpointError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import load_upsampler
from aiprod_core.model.conv_blocks import PerChannelStatistics
from aiprod_core.model.upsampler import LatentUpsampler, UpsamplerConfig, upsample_latent

TINY = UpsamplerConfig(in_channels=4, mid_channels=32, num_blocks_per_stage=1)
TEMPORAL = replace(TINY, spatial_upsample=False, temporal_upsample=True)


def upsampler(config: UpsamplerConfig) -> LatentUpsampler:
    torch.manual_seed(0)
    return LatentUpsampler(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TINY, (3, 8, 12)),
        (replace(TINY, rational_resampler=True), (3, 8, 12)),
        (replace(TINY, rational_resampler=True, spatial_scale=1.5), (3, 6, 9)),
        (replace(TINY, rational_resampler=True, spatial_scale=0.75), (3, 3, 5)),
        (replace(TINY, rational_resampler=True, spatial_scale=4.0), (3, 16, 24)),
        (TEMPORAL, (5, 4, 6)),
        (replace(TINY, temporal_upsample=True), (5, 8, 12)),
    ],
)
def test_latents_grow_as_the_config_says(config: UpsamplerConfig, size: tuple[int, ...]) -> None:
    assert upsampler(config)(torch.randn(2, 4, 3, 4, 6)).shape == (2, 4, *size)


def test_a_single_latent_frame_stays_single_when_time_is_doubled() -> None:
    assert upsampler(TEMPORAL)(torch.randn(1, 4, 1, 4, 4)).shape[2] == 1


def test_the_network_works_on_raw_latents_and_the_result_is_normalised_again() -> None:
    network = upsampler(TINY)
    statistics = PerChannelStatistics(4)
    statistics.get_buffer("mean-of-means").copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    statistics.get_buffer("std-of-means").copy_(torch.tensor([1.0, 2.0, 0.5, 3.0]))
    raw = torch.randn(1, 4, 2, 4, 4)
    got = upsample_latent(network, statistics.normalize(raw), statistics)
    torch.testing.assert_close(statistics.un_normalize(got), network(raw), atol=1e-4, rtol=1e-4)


def test_the_blur_keeps_a_flat_picture_flat_inside_its_border() -> None:
    network = upsampler(replace(TINY, rational_resampler=True, spatial_scale=1.5))
    flat = torch.ones(1, 32, 9, 9)
    blurred = network.upsampler.get_submodule("blur_down")(flat)
    assert blurred.shape == (1, 32, 5, 5)
    torch.testing.assert_close(blurred[..., 1:-1, 1:-1], torch.ones(1, 32, 3, 3))


@pytest.mark.parametrize(
    "config", [TINY, TEMPORAL, replace(TINY, rational_resampler=True, spatial_scale=1.5)]
)
def test_a_written_upsampler_loads_again(config: UpsamplerConfig, tmp_path: Path) -> None:
    network = upsampler(config)
    path = tmp_path / "upsampler.safetensors"
    save_checkpoint(path, [(key_maps.UPSAMPLER, network)], {"config": config.to_metadata()})
    loaded = load_upsampler(open_checkpoint(path))
    latent = torch.randn(1, 4, 2, 4, 4)
    assert loaded.config == config
    torch.testing.assert_close(loaded(latent), network(latent), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dims": 2}, "dims 2"),
        ({"_class_name": "Other"}, "_class_name 'Other'"),
        ({"rational_resampler": True, "spatial_scale": 3.0}, "spatial_scale 3.0"),
        ({"spatial_scale": 1.5}, "spatial_scale 1.5"),
        ({"spatial_upsample": False}, "both false"),
        ({"mid_channels": 48}, "mid_channels 48"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_key_and_value(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        UpsamplerConfig.from_metadata(TINY.to_metadata() | changes)
