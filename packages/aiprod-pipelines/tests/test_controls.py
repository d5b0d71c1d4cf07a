"""Control signals: where edges, depth and limbs are, and what is said when a tool is missing."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_pipelines.controls import LIMBS, blur, draw_skeletons, make_control


@pytest.fixture
def square() -> np.ndarray:
    """A white square from 16 to 47 on black, in three frames of 64 x 80."""
    frames = np.zeros((3, 64, 80, 3), np.uint8)
    frames[:, 16:48, 16:48] = 255
    return frames


def test_canny_finds_the_outline_and_nothing_else(square: np.ndarray):
    edges = make_control("canny", square)
    assert edges.shape == square.shape and edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    y, x, _ = np.nonzero(edges[0])
    to_outline = np.minimum.reduce([abs(y - 15.5), abs(y - 47.5), abs(x - 15.5), abs(x - 47.5)])
    assert to_outline.max() < 2
    assert 100 < len(y) / 3 < 150  # an outline of 4 x 32 pixels
    assert not make_control("canny", np.full((1, 64, 64, 3), 99, np.uint8)).any()


def test_blur_keeps_the_light_and_loses_the_edges(square: np.ndarray):
    blurred = blur(square, sigma=4)
    assert blurred.shape == square.shape
    assert blurred.mean() == pytest.approx(square.mean(), rel=0.03)
    steps = np.abs(np.diff(blurred.astype(int), axis=2)).max()
    assert steps < 40 < np.abs(np.diff(square.astype(int), axis=2)).max()


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random depth-estimation model of a few thousand weights, in transformers' own format."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    folder = tmp_path_factory.mktemp("depth")
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    network = DPTForDepthEstimation(config)
    for name, parameter in network.named_parameters():
        if "head" in name:  # above zero, or the last ReLU would hide everything
            torch.nn.init.uniform_(parameter, 0.0, 0.5)
    network.save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_depth_loads_a_model_by_path_and_gives_grey_frames_of_the_same_size(
    square: np.ndarray, depth_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AIPROD_DEPTH_MODEL", str(depth_model))
    maps = make_control("depth", square, device="cpu", batch_size=2)
    assert maps.shape == square.shape and maps.dtype == np.uint8
    assert (maps.min(), maps.max()) == (0, 255)
    assert np.array_equal(maps[..., 0], maps[..., 2])


def test_depth_is_scaled_over_the_whole_clip_not_frame_by_frame(
    square: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    def brightness(*args, **options):
        return lambda images: [
            {"predicted_depth": np.asarray(image.convert("L"), np.float32)} for image in images
        ]

    monkeypatch.setattr("transformers.pipeline", brightness)
    square[1] //= 2
    maps = make_control("depth", square, batch_size=2)
    assert maps[0].max() == maps[2].max() == 255
    assert maps[1].max() in (126, 127, 128)


def test_a_depth_model_that_is_not_there_is_one_sentence(square: np.ndarray, tmp_path: Path):
    with pytest.raises(InputError, match=r"empty: no depth-estimation model.*AIPROD_DEPTH_MODEL"):
        (tmp_path / "empty").mkdir()
        make_control("depth", square, model=tmp_path / "empty")


def person(height: int, width: int) -> np.ndarray:
    points = np.random.default_rng(0).uniform(0.2, 0.8, (17, 3))
    return points * [width, height, 0] + [0, 0, 1]


def test_pose_draws_each_sure_key_point_and_limb_where_it_is(square: np.ndarray):
    points = person(64, 80)
    points[[9, 10], 2] = 0.1
    drawn = make_control("pose", square, find=lambda frame: [points])
    assert drawn.shape == square.shape
    for index, (x, y, score) in enumerate(points):
        if score > 0.3:
            assert drawn[0, round(y), round(x)].max() == 255, index
    alone = np.zeros((17, 3))
    alone[list(LIMBS[0])] = [[10, 20, 1], [60, 40, 1]]
    limb = draw_skeletons([alone], 64, 80)
    assert limb[30, 35].max() > 200  # half way
    assert not limb[50:].any()


def test_a_frame_without_people_is_black(square: np.ndarray):
    drawn = make_control("pose", square, find=lambda frame: np.zeros((0, 17, 3)))
    assert not drawn.any()


def test_pose_without_its_packages_says_what_to_install(square: np.ndarray, monkeypatch):
    for name in ("rtmlib", "mediapipe", "mediapipe.python.solutions.pose"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install rtmlib"):
        make_control("pose", square)


def test_an_unknown_control_is_refused_by_name(square: np.ndarray):
    with pytest.raises(InputError, match="one of canny, depth, pose, blur; got edges"):
        make_control("edges", square)
