"""Trainings that go on from a checkpoint begin where it stands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import (
    load_video_decoder,
    load_video_encoder,
    load_vocoder,
)
from aiprod_core.types import ScaleFactors
from aiprod_trainer import export, prepare_world, train_base, train_video_codec, train_vocoder
from aiprod_trainer.data import Batch, LatentDataset
from aiprod_trainer.train_base import BaseTrainingConfig, drop_features, losses_at
from aiprod_trainer.train_video_codec import VideoCodecConfig, clips, train
from aiprod_trainer.train_vocoder import VocoderTrainingConfig, level_loss
from aiprod_trainer.world.render import object_mask
from aiprod_trainer.world.scene import sample_scene


@pytest.fixture(scope="module")
def tiny_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with latent statistics that are not the identity."""
    path = tmp_path_factory.mktemp("scaled") / tiny_model.name
    (path.parent / "text_encoder").symlink_to(tiny_model.parent / "text_encoder")
    with safe_open(tiny_model, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tiny_model)
    tensors["vae.per_channel_statistics.mean-of-means"] += 0.5
    tensors["vae.per_channel_statistics.std-of-means"] *= 3
    save_file(tensors, path, metadata=metadata)
    return path


def config_of(tiny_model: Path, **settings: object) -> VideoCodecConfig:
    fixed = {"size": 32, "num_frames": 9, "batch_size": 1, "warmup_steps": 1, "eval_every": 100}
    return VideoCodecConfig(
        vae=open_checkpoint(tiny_model).section("vae"), start=tiny_model, **{**fixed, **settings}
    )


def test_a_codec_goes_on_from_what_the_checkpoint_decodes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def record(decoded, pixels, mask, object_weight):
        seen.append((decoded.detach(), pixels))
        return (decoded - pixels).square().mean()

    monkeypatch.setattr(train_video_codec, "reconstruction_loss", record)
    # Without the sampling noise the first step sees what the loaded pair of networks gives.
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(*shape))
    train(config_of(tiny_model, steps=1), tmp_path / "run")
    checkpoint = open_checkpoint(tiny_model)
    encoder = load_video_encoder(checkpoint, dtype=torch.float32)
    decoder = load_video_decoder(checkpoint, dtype=torch.float32)
    decoded, pixels = seen[0]
    with torch.no_grad():
        torch.testing.assert_close(decoded, decoder(encoder(pixels)), rtol=1e-4, atol=1e-4)


def test_kept_latents_stay_while_the_codec_learns_another_size(tiny_model: Path, tmp_path: Path):
    def drift(keep_latents: float) -> float:
        config = config_of(
            tiny_model, steps=12, further_sizes=(64,), keep_latents=keep_latents, muon_lr=3e-3
        )
        # The average lags behind in so few steps; it moves all the same.
        trained = train(config, tmp_path / f"run{keep_latents}")
        pixels, _ = clips("v1", 32, np.random.default_rng(5), 2, 9)
        start = load_video_encoder(open_checkpoint(tiny_model), dtype=torch.float32)
        with torch.no_grad():
            return float((trained.encoder(pixels) - start(pixels)).square().mean())

    assert drift(100.0) < 0.5 * drift(0.0)


def test_a_further_world_is_learnt_in_turn_and_judged_apart(tiny_model: Path, tmp_path: Path):
    config = config_of(tiny_model, steps=2, further_worlds=("v2",), eval_every=2)
    train(config, tmp_path / "run")
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert {"psnr_v1_32", "psnr_v2_32"} <= last.keys()
    assert last["psnr_v1_32"] != last["psnr_v2_32"]


def test_codecs_that_went_on_keep_the_sound_and_the_statistics(tiny_model: Path, tmp_path: Path):
    train(config_of(tiny_model, steps=2, muon_lr=3e-3), tmp_path / "run")
    target = tmp_path / "codecs.safetensors"
    command = ["codecs", "--video", str(tmp_path / "run"), "--out", str(target)]
    assert export.main([*command, "--dtype", "float32"]) == 2  # sound from nowhere
    assert export.main([*command, "--dtype", "float32", "--sound-of", str(tiny_model)]) == 0
    before, after = load_file(tiny_model), load_file(target)
    kept = [key for key in after if key.startswith(("audio_vae.", "vocoder."))]
    kept += [key for key in after if "statistics" in key]
    assert kept
    for key in kept:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    moved = [key for key in after if key.startswith("vae.decoder") and key.endswith("weight")]
    assert any(not torch.equal(after[key], before[key]) for key in moved)


def test_object_cells_are_where_the_object_is_seen_at_any_time_of_a_latent_frame():
    scene = sample_scene(np.random.default_rng(3), motion="roll right", size="small")
    mask = torch.from_numpy(object_mask(scene, 64))[None]
    cells = prepare_world._cells(mask, (7, 4, 4))[0]
    # The first latent frame is the first frame; each further one four; a cell is 16 x 16 pixels.
    groups = [slice(0, 1), *(slice(start, start + 4) for start in range(1, 25, 4))]
    for frame, group in enumerate(groups):
        for row in range(4):
            for column in range(4):
                block = mask[0, group, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                assert cells[frame, row, column] == (block > 0.5).any()
    assert 0 < cells.float().mean() < 0.5


def test_cells_with_the_object_count_more_by_the_weight_asked_for():
    cells = torch.zeros(1, 1, 2, 2)
    cells[0, 0, 1, 0] = 1
    batch = Batch(
        torch.randn(1, 3, 1, 2, 2),
        torch.randn(1, 2, 4, 16),
        {"hidden": torch.zeros(1, 1, 1, 1)},
        torch.ones(1, 1),
        {"object_cells": cells},
    )
    seen = {}

    class Still(torch.nn.Module):  # predicts that nothing flows
        def projector(self, hidden, mask):
            return torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), mask

        def transformer(self, video, audio):
            seen["clean"], seen["noisy"] = batch.video.flatten(2).mT, video.latent
            return torch.zeros_like(video.latent), torch.zeros_like(audio.latent)

    sigma = torch.tensor([0.5])
    generator = torch.Generator().manual_seed(0)
    scale = ScaleFactors(4, 16, 16)
    found, _ = losses_at(Still(), batch, (sigma, sigma), False, generator, 12.0, scale, 3.0)  # type: ignore[arg-type]
    velocity = (seen["noisy"] - seen["clean"]) / 0.5
    each = velocity.square().mean(dim=-1)[0]
    expected = (each[0] + each[1] + 4 * each[2] + each[3]) / 7
    torch.testing.assert_close(found, expected)


@pytest.fixture
def base_config(tiny_model: Path, latents: Path) -> BaseTrainingConfig:
    checkpoint = open_checkpoint(tiny_model)
    return BaseTrainingConfig(
        transformer=checkpoint.section("transformer"),
        text_encoder=checkpoint.section("text_encoder"),
        codecs=tiny_model,
        start=tiny_model,
        latents=latents,
        batch_size=4,
        steps=2,
        warmup_steps=1,
        compile=False,
    )


def test_a_transformer_goes_on_in_16_bits_from_the_same_loss(
    base_config: BaseTrainingConfig, tmp_path: Path
):
    def first_loss(precision: str) -> float:
        folder = tmp_path / precision
        trained = train_base.train(base_config.model_copy(update={"precision": precision}), folder)
        assert all(p.dtype == torch.float32 for p in trained.parameters())
        return json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]

    wide, half = first_loss("float32"), first_loss("bfloat16")
    assert half != wide
    assert half == pytest.approx(wide, rel=0.02)


def test_half_of_the_captions_lose_features_of_all_their_tokens():
    hidden = torch.ones(200, 5, 40, 3)
    dropped = drop_features(hidden, 0.25, torch.Generator().manual_seed(0))
    assert dropped.unique().tolist() == pytest.approx([0, 1, 4 / 3])
    assert (dropped == dropped[:, :1]).all()
    is_chosen = (dropped != 1).flatten(1).any(dim=1)
    assert 70 < is_chosen.sum() < 130
    assert (dropped[is_chosen] == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert dropped.mean() == pytest.approx(1, abs=0.02)


def test_processes_that_share_a_step_draw_from_one_bucket(
    base_config: BaseTrainingConfig, tmp_path: Path, make_part, monkeypatch: pytest.MonkeyPatch
):
    for size in (3, 4):
        make_part(tmp_path / f"latents/{size}/part-00000.safetensors", size=size)
    config = base_config.model_copy(update={"latents": tmp_path / "latents", "steps": 8})

    def sizes_drawn(rank: int) -> list[int]:
        drawn = []
        monkeypatch.setattr(
            LatentDataset, "draw", lambda self, bucket, *_: drawn.append(bucket.shapes["video"][-1])
        )
        monkeypatch.setattr(train_base, "join", lambda: (rank, 2))
        monkeypatch.setattr(train_base, "losses", lambda model, *_: [_still(model)] * 2)
        for name in ("average_gradients", "muon_and_adamw"):
            monkeypatch.setattr(train_base, name, lambda *_, **__: {})
        train_base.train(config, tmp_path / f"run{rank}")
        return drawn

    drawn = sizes_drawn(0)
    assert sizes_drawn(1) == drawn
    assert set(drawn) == {3, 4}


def _still(model: torch.nn.Module) -> torch.Tensor:
    return sum(p.sum() for p in model.parameters()) * 0  # type: ignore[return-value]


def test_a_vocoders_training_begins_with_the_given_weights(tiny_model: Path, tmp_path: Path):
    checkpoint = open_checkpoint(tiny_model)
    config = VocoderTrainingConfig(
        vocoder=checkpoint.section("vocoder"),
        audio_vae=checkpoint.section("audio_vae"),
        start=tiny_model,
        steps=1,
        batch_size=1,
        muon_lr=0,
        adamw_lr=0,
    )
    trained = train_vocoder.train(config, tmp_path / "run").state_dict()
    for name, tensor in load_vocoder(checkpoint, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6)


def test_a_quiet_vocoder_is_told_so_and_another_phase_is_not():
    generator = torch.Generator().manual_seed(0)
    hiss, other = torch.randn(2, 1, 2, 16000, generator=generator)
    same = level_loss(hiss, other)
    assert level_loss(0.5 * hiss, other) == pytest.approx(np.log(4), abs=0.1)
    assert same < 0.3  # chance of two noises in windows of 48 ms
