"""Training latent upsamplers on the world, and the files that come of it."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_upsampler
from aiprod_trainer import train_upsampler
from aiprod_trainer.export import export_upsampler
from aiprod_trainer.train_upsampler import UpsamplerTrainingConfig, train


def config_of(codecs: Path, doubles: str, **settings: object) -> UpsamplerTrainingConfig:
    network = {
        "in_channels": 8,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "spatial_upsample": doubles == "space",
        "temporal_upsample": doubles == "time",
    }
    sizes = {"num_frames": 17, "crop_frames": 17, "batch_size": 1, "warmup_steps": 1}
    return UpsamplerTrainingConfig(
        upsampler=network, codecs=codecs, **{**sizes, "steps": 2, **settings}
    )


@pytest.mark.parametrize(("doubles", "shape"), [("space", (3, 4, 4)), ("time", (5, 2, 2))])
def test_what_was_trained_is_exported_and_doubles_latents(
    tiny_model: Path, tmp_path: Path, doubles: str, shape: tuple[int, ...]
):
    config = config_of(tiny_model, doubles)
    assert config.doubles == doubles
    trained = train(config, tmp_path / "run")
    target = tmp_path / "upscaler.safetensors"
    export_upsampler(Namespace(run=tmp_path / "run", out=target, dtype="float32"))
    loaded = load_upsampler(open_checkpoint(target))
    latent = torch.randn(1, 8, 3, 2, 2)
    with torch.no_grad():
        assert torch.equal(loaded(latent), trained(latent))
    assert loaded(latent).shape[2:] == shape
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert {"psnr", "resized_psnr", "codec_psnr"} <= last.keys()


def test_the_loss_falls_on_clips_that_come_again(tiny_model: Path, tmp_path: Path, monkeypatch):
    fixed = train_upsampler.clips(config_of(tiny_model, "space"), np.random.default_rng(0), 1, 17)
    monkeypatch.setattr(train_upsampler, "clips", lambda *_: fixed)
    train(config_of(tiny_model, "space", steps=30, eval_every=5, muon_lr=3e-3), tmp_path)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.7 * losses[0]
