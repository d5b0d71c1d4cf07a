"""A request is refused before any weight is read, and says what would work."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aiprod_core.errors import InputError
from aiprod_core.types import ScaleFactors
from aiprod_pipelines.request import GenerationRequest, ImageCondition, ModelProfile, PerModality

LTX = ModelProfile(scale=ScaleFactors(8, 32, 32))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "first.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    return path


def test_what_is_left_out_comes_from_the_model():
    full = GenerationRequest("a red ball").resolved(LTX)
    assert (full.height, full.width, full.num_frames, full.frame_rate) == (512, 768, 121, 24.0)
    assert full.cfg_scale == PerModality(video=3.0, audio=7.0)
    assert GenerationRequest("a", height=64).resolved(LTX).height == 64
    assert (full.sampler, full.schedule) == ("euler", "shifted")


def test_a_checkpoint_brings_its_own_defaults():
    nano = LTX.replaced({"height": 64, "num_frames": 25, "cfg_scale": {"video": 2, "audio": 3}})
    full = GenerationRequest("a red ball").resolved(nano)
    assert (full.height, full.num_frames, full.cfg_scale) == (64, 25, (2, 3))
    with pytest.raises(InputError, match="steps"):
        LTX.replaced({"steps": 3})


def test_a_second_stage_has_the_published_levels_unless_the_header_or_the_request_has_others():
    assert GenerationRequest("a").resolved(LTX).stage_2_sigmas == (0.909375, 0.725, 0.421875)
    nano = LTX.replaced({"stage_2_sigmas": [0.15, 0.07]})
    assert GenerationRequest("a").resolved(nano).stage_2_sigmas == (0.15, 0.07)
    own = GenerationRequest("a", stage_2_sigmas=[0.3]).resolved(nano)
    assert GenerationRequest.from_dict(own.to_dict()).stage_2_sigmas == (0.3,)
    for wrong in ([], [0.1, 0.2], [0.2, 0.0], [1.5], "low", [None]):
        with pytest.raises(InputError, match=r"stage_2_sigmas .* try"):
            LTX.replaced({"stage_2_sigmas": wrong})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 120}, "8k\\+1; got 120, try 121"),
        ({"num_frames": 2}, "got 2, try 1"),
        ({"width": 500}, "width must be a multiple of 32; got 500, try 512"),
        ({"height": 10}, "height must be a multiple of 32; got 10, try 32"),
        ({"num_frames": 0}, "at least 1; got 0, try 1"),
        ({"num_frames": 9.5}, "whole number; got 9.5"),
        ({"width": True}, "whole number; got True"),
        ({"frame_rate": 0}, "frame_rate must be from 0.1 to 1000.0; got 0, try 0.1"),
        ({"frame_rate": float("nan")}, "frame_rate must be a number; got nan"),
        ({"num_inference_steps": 0}, "num_inference_steps must be from 1 .* try 1"),
        ({"seed": -1}, "seed must be from 0 .* try 0"),
        ({"cfg_scale": -1.0}, "cfg_scale of video .* got -1.0, try 0.0"),
        ({"rescale_scale": PerModality(0.5, 2.0)}, "rescale_scale of audio .* try 1.0"),
        ({"stg_blocks": (48,)}, "stg_blocks must be from 0 to 47; got 48, try 47"),
        ({"enlarge": 0}, "enlarge must be from 1 to 64; got 0, try 1"),
        ({"enlarge_method": "area"}, "nearest, bicubic, lanczos; got area"),
        ({"prompt": "  "}, "prompt is empty"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_value_that_does(values, message):
    with pytest.raises(InputError, match=message):
        GenerationRequest(**({"prompt": "a red ball"} | values)).resolved(LTX)


def test_an_image_must_lie_in_the_clip_and_be_readable(picture: Path, tmp_path: Path):
    def resolve(*images):
        return GenerationRequest("a", num_frames=25, images=images).resolved(LTX)

    assert resolve(ImageCondition(picture, 24)).images[0].frame == 24
    with pytest.raises(
        InputError, match="frame 25 is outside the clip of 25 frames; the last is 24"
    ):
        resolve(ImageCondition(picture, 25))
    with pytest.raises(InputError, match=r"absent\.png: no such file"):
        resolve(tmp_path / "absent.png")
    with pytest.raises(InputError, match="two images are given for frame 8"):
        resolve((picture, 8), (picture, 8, 0.5))
    with pytest.raises(InputError, match=r"image strength must be from 0.0 to 1.0; got 1.5"):
        resolve((picture, 0, 1.5))


def test_image_text_names_path_frame_and_strength(tmp_path: Path):
    assert ImageCondition.parse("a.png") == ImageCondition(Path("a.png"), 0, 1.0)
    assert ImageCondition.parse("a.png:16:0.5") == ImageCondition(Path("a.png"), 16, 0.5)
    odd = tmp_path / "shot:3"
    odd.write_bytes(b"x")
    assert ImageCondition.parse(f"{odd}") == ImageCondition(odd, 0)
    assert ImageCondition.parse(f"{odd}:8") == ImageCondition(odd, 8)
    with pytest.raises(InputError, match="frame is a whole number"):
        ImageCondition.parse("a.png:0.5")


def test_scales_are_one_number_or_one_for_each_modality():
    assert PerModality.parse("3", "x") == (3.0, 3.0)
    assert PerModality.parse("audio=7,video=3", "x") == (3.0, 7.0)
    for text in ("three", "video=3", "picture=3,audio=1", "3,7"):
        with pytest.raises(InputError, match=r"--cfg-scale is one number .* try"):
            PerModality.parse(text, "--cfg-scale")


def test_a_request_survives_the_trip_through_plain_values(picture: Path):
    request = GenerationRequest(
        "a", cfg_scale=PerModality(3, 7), images=((picture, 8, 0.5),), stg_blocks=(1, 2)
    ).resolved(LTX)
    assert GenerationRequest.from_dict(request.to_dict()) == request
    with pytest.raises(InputError, match="unknown fields frames"):
        GenerationRequest.from_dict({"prompt": "a", "frames": 9})


def test_a_silent_model_makes_silent_clips():
    silent = ModelProfile(scale=ScaleFactors(8, 32, 32), has_audio=False)
    assert not GenerationRequest("a").resolved(silent).generate_audio
