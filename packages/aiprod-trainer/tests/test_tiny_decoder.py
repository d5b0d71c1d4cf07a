"""The small decoder: trained from the full one, found beside the model, refused where it is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_video_decoder
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline
from aiprod_trainer.train_tiny_decoder import HELD_OUT, TinyDecoderConfig, train


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path, make_part) -> TinyDecoderConfig:
    folder = tmp_path / "latents"
    make_part(folder / "part-00000.safetensors", clips=HELD_OUT + 2)
    return TinyDecoderConfig(
        model=tiny_model,
        latents=folder,
        decoder_base_channels=8,
        decoder_blocks=[
            ["compress_all", {"multiplier": 2, "residual": True}],
            ["res_x", {"num_layers": 1}],
            ["compress_all", {"multiplier": 1}],
        ],
        batch_size=2,
        steps=60,
        warmup_steps=1,
        muon_lr=0.02,
        adamw_lr=0.01,
        eval_every=30,
    )


def test_a_small_decoder_comes_nearer_to_the_full_one_and_makes_previews_beside_the_model(
    config: TinyDecoderConfig, tiny_model: Path, tmp_path: Path
):
    path = train(config, tmp_path / "run")
    assert path is not None and path.name == "tiny-tiny-decoder.safetensors"
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    statistics = load_video_decoder(open_checkpoint(tiny_model)).per_channel_statistics
    decoder = load_video_decoder(open_checkpoint(path), dtype=torch.float32)
    for name, value in statistics.state_dict().items():
        assert torch.allclose(value, decoder.per_channel_statistics.get_buffer(name), rtol=1e-3)

    # Without its file it is refused; with it, the latents stay and the picture is another.
    folder = tmp_path / "model"
    shutil.copytree(tiny_model.parent, folder)
    pipeline = TI2VidOneStagePipeline.from_model(str(folder / tiny_model.name))
    with pytest.raises(InputError, match=r"tiny-tiny-decoder\.safetensors is not in"):
        pipeline("a red ball", decoder="tiny")
    shutil.copy(path, folder)
    clips = [pipeline("a red ball", decoder=name) for name in ("full", "tiny")]
    assert torch.equal(clips[0].latents.video, clips[1].latents.video)
    frames = [torch.cat(list(clip.frames())) for clip in clips]
    assert frames[0].shape == frames[1].shape
    assert not torch.equal(frames[0], frames[1])
    with pytest.raises(InputError, match="decoder must be one of full, tiny; got tin"):
        pipeline("a red ball", decoder="tin")


def test_blocks_for_another_grid_are_refused(config: TinyDecoderConfig, tmp_path: Path):
    other = config.model_copy(update={"decoder_blocks": [["compress_all", {"multiplier": 1}]]})
    with pytest.raises(InputError, match="make a grid of"):
        train(other, tmp_path / "run")
