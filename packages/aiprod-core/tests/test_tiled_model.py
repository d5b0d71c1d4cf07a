"""A transformer through tiles: weights that sum to one, positions that stay, one tile exact."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiprod_core.components import conditioning
from aiprod_core.components.patchifiers import VideoGrid
from aiprod_core.components.tiled_model import in_tiles, tile_weights
from aiprod_core.model.transformer import Perturbations
from aiprod_core.types import Modality, ScaleFactors, VideoLatentShape

SCALE = ScaleFactors(8, 32, 32)
GRID = VideoGrid(VideoLatentShape(1, 6, 2, 5, 7), SCALE, 24.0)


def as_modality(state, like: Modality) -> Modality:
    batch = len(like.latent)
    generator = torch.Generator().manual_seed(3)
    tokens = state.latent.shape[1]
    return replace(
        like,
        latent=torch.randn(batch, tokens, 6, generator=generator),
        timesteps=torch.rand(batch, tokens, 1, generator=generator),
        positions=state.positions.expand(batch, -1, -1, -1),
        attention_mask=state.attention_mask,
        keyframe_marker=None,
    )


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 8), st.integers(2, 8))
def test_weights_sum_to_one_everywhere_and_no_tile_is_larger(height, width, rows, columns) -> None:
    weights = tile_weights((height, width), (rows, columns), (max(1, rows // 4), 1))
    torch.testing.assert_close(weights.sum(0), torch.ones(height, width))
    for weight in weights:
        assert (weight > 0).any(1).sum() <= rows and (weight > 0).any(0).sum() <= columns


def test_one_tile_is_the_model_itself(tiny_config, randomised) -> None:
    model = randomised(tiny_config)
    assert in_tiles(model, tile_weights((5, 7), (8, 8), (2, 2)), SCALE) is model


def test_tiles_keep_their_places_and_are_blended_by_weight(
    tiny_config, randomised, modalities
) -> None:
    model = randomised(tiny_config)
    like, audio = modalities(tiny_config)
    state = conditioning.video_state(GRID)
    image = torch.randn(1, 6, 1, 5, 7)
    state = conditioning.append_keyframe(state, GRID, image, frame=8, attention=0.5)
    video = as_modality(state, like)
    weights = tile_weights((5, 7), (5, 4), (0, 1))
    assert len(weights) == 2
    velocity, sound = in_tiles(model, weights, SCALE)(video, audio)
    # By hand: the left four columns, the right four, of the clip's and the keyframe's 3 x 5 rows.
    columns = torch.arange(video.latent.shape[1]) % 7
    expected, sounds = torch.zeros_like(velocity), []
    for start, weight in ((0, [1, 1, 1, 0.5]), (3, [0.5, 1, 1, 1])):
        index = ((columns >= start) & (columns < start + 4)).nonzero()[:, 0]
        part = replace(
            video,
            latent=video.latent[:, index],
            timesteps=video.timesteps[:, index],
            positions=video.positions[:, :, index],
            attention_mask=video.attention_mask[:, index][:, :, index],
        )
        tile, tile_sound = model(part, audio)
        expected[:, index] += tile * torch.tensor(weight)[columns[index] - start, None]
        sounds.append(tile_sound)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sound, (sounds[0] + sounds[1]) / 2, rtol=1e-4, atol=1e-5)


def test_the_model_sees_one_tile_at_a_time(tiny_config, randomised, modalities) -> None:
    model = randomised(tiny_config)
    like, audio = modalities(tiny_config)
    video = as_modality(conditioning.video_state(GRID), like)
    seen = []

    def spy(video, audio, perturbations):
        seen.append((video.latent.shape[1], perturbations))
        return model(video, audio, perturbations)

    perturbations = Perturbations(({}, {"SKIP_A2V_CROSS_ATTN": None}))
    tiled = in_tiles(spy, tile_weights((5, 7), (3, 4), (1, 1)), SCALE)
    velocity, _ = tiled(video, audio, perturbations)
    assert velocity.shape == video.latent.shape
    assert [count for count, _ in seen] == [2 * 3 * 4] * 4
    assert all(given is perturbations for _, given in seen)


def test_without_a_picture_nothing_is_tiled(tiny_config, randomised, modalities) -> None:
    model = randomised(replace(tiny_config, has_video=False))
    _, audio = modalities(tiny_config)
    tiled = in_tiles(model, tile_weights((5, 7), (3, 4), (1, 1)), SCALE)
    assert torch.equal(tiled(None, audio)[1], model(None, audio)[1])


@pytest.mark.parametrize("axis", [1, 2])
def test_a_picture_turned_by_a_quarter_is_tiled_alike(axis: int) -> None:
    weights = tile_weights((9, 9), (4, 9) if axis == 1 else (9, 4), (1, 1))
    assert weights.shape == (3, 9, 9)
    assert (weights > 0).any(dim=3 - axis).sum(1).tolist() == [4, 4, 4]
