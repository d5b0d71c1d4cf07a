"""Distillation: targets, the matching gradient, exact resume, and the files that come of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from aiprod_core.components import schedulers
from aiprod_core.components.samplers import euler_step
from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.lora import fuse, open_lora
from aiprod_core.loader.networks import load_transformer
from aiprod_core.types import AV
from aiprod_pipelines.distilled import DistilledPipeline
from aiprod_trainer import distill as script
from aiprod_trainer.cli import distill_app
from aiprod_trainer.distill import (
    DistillConfig,
    TaskMaker,
    build_networks,
    distill,
    match_distribution,
    matching_gradient,
    trajectory_target,
)
from aiprod_trainer.low_rank import LowRank, nearest, publish
from aiprod_trainer.run import Run, read_state


@pytest.fixture
def settings(tiny_model: Path, latents: Path, tmp_path: Path):
    def build(**changes: Any) -> DistillConfig:
        values: dict[str, Any] = {
            "model": str(tiny_model),
            "latents": latents,
            "output_dir": tmp_path / "run",
            "trajectory_steps": 2,
            "matching_steps": 2,
            "fake_updates": 1,
            "fake_warmup": 1,
            "batch_size": 2,
            "first_frame_p": 0.5,
            "eval_every": 100,
            "rank": 4,
            "max_teacher_step": 0.5,
        }
        return DistillConfig(**{**values, **changes})

    return build


def test_the_trajectory_target_leads_where_a_gaussian_teachers_flow_leads():
    mean, deviation = 0.7, 0.5

    def spread(sigma: float) -> float:
        return ((1 - sigma) ** 2 * deviation**2 + sigma**2) ** 0.5

    def teach(x: AV, sigma: float) -> AV:
        gain = (1 - sigma) * deviation**2 / spread(sigma) ** 2
        return x.map(lambda t: mean + gain * (t - (1 - sigma) * mean))

    x = AV(torch.randn(3, 5, 4), torch.randn(3, 2, 6))
    start, end = 0.725, 0.421875
    target = trajectory_target(teach, x, start, end, 0.001)
    arrived = euler_step(x, target, start, end)
    scale = spread(end) / spread(start)
    for ours, began in ((arrived.video, x.video), (arrived.audio, x.audio)):
        assert ours is not None and began is not None
        exact = (1 - end) * mean + scale * (began - (1 - start) * mean)
        assert torch.allclose(ours, exact, atol=1e-3)
    # One big step of the teacher's leads elsewhere: there is something to learn.
    assert not torch.allclose(target.video, teach(x, start).video, atol=1e-2)


def test_the_matching_gradient_is_zero_where_fake_equals_real_and_points_to_real_elsewhere():
    made, real = AV(torch.randn(2, 5, 4)), AV(torch.randn(2, 5, 4))
    assert matching_gradient(made, real, real).video.abs().max() == 0
    push = matching_gradient(made, real, made).video
    assert torch.allclose(
        push * (made.video - real.video).abs().mean((1, 2), True), made.video - real.video
    )


def test_a_student_is_left_alone_by_a_fake_score_that_agrees_with_an_unguided_teacher(settings):
    config = settings(guidance={"cfg_scale": 1}, adamw_lr=0.0)
    maker = TaskMaker.open(config)
    networks = build_networks(config, maker.models)
    task = maker.draw(np.random.default_rng(0), 2)
    match_distribution(
        config, networks, task, schedulers.distilled(4), torch.Generator(), [], is_taught=True
    )
    grads = [p.grad for p in networks.weights["student"].parameters() if p.grad is not None]
    assert grads and all(grad.abs().max() < 1e-6 for grad in grads)


@pytest.mark.parametrize("stop_after", [1, 3])  # in either stage
def test_a_stopped_and_resumed_distillation_ends_bit_for_bit_where_an_unbroken_one_does(
    settings, tmp_path: Path, monkeypatch, stop_after: int
):
    whole = distill(settings(output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        log = Run.log

        def log_and_stop(run: Run, **values: float) -> None:
            log(run, **values)
            if run.step + 1 == stop_after:
                run._stop()

        patch.setattr(Run, "log", log_and_stop)
        assert distill(settings(output_dir=tmp_path / "broken")) == []
    broken = distill(settings(output_dir=tmp_path / "broken"))
    for name in ("student", "fake", "average", "fake optimizer", "student muon optimizer"):
        states = [read_state(tmp_path / f / "state.safetensors", name) for f in ("whole", "broken")]
        assert states[0].keys() == states[1].keys() and states[0]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [path.name for path in whole] == [path.name for path in broken]
    for ours, theirs in zip(whole, broken, strict=True):
        tensors = load_file(ours), load_file(theirs)
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_the_lora_of_full_rank_does_what_the_whole_student_does(settings, tiny_model: Path):
    model, lora = distill(settings(rank=1000))
    assert (model.name, lora.name) == (
        "tiny-distilled.safetensors",
        "tiny-distilled-lora-1000.safetensors",
    )
    base = load_transformer(open_checkpoint(tiny_model))
    original = {name: p.clone() for name, p in base.named_parameters()}
    fuse(base, [(open_lora(lora), 1.0)])
    student = load_transformer(open_checkpoint(model))
    moved = 0.0
    for name, weight in student.named_parameters():
        assert torch.allclose(base.get_parameter(name), weight, atol=1e-6), name
        moved = max(moved, float((weight - original[name]).abs().max()))
    assert moved > 1e-4


def test_a_distilled_file_runs_in_8_and_in_4_steps(settings, tiny_model: Path):
    model, _ = distill(settings(trajectory_steps=1, matching_steps=0))
    text_encoder = tiny_model.parent / "text_encoder"
    pipeline = DistilledPipeline.from_model(str(model), text_encoder=text_encoder)
    assert pipeline.models.is_distilled
    for steps in (8, 4):
        clip = pipeline("a red ball", skip_stage_2=True, num_inference_steps=steps)
        assert clip.request.distilled_lora is None
        assert torch.isfinite(clip.latents.video).all()
    with pytest.raises(InputError, match="8 or 4 steps; got 5, try 4"):
        pipeline("a red ball", skip_stage_2=True, num_inference_steps=5)


def test_low_rank_students_share_the_base_and_leave_the_teacher_as_it_was(settings, tiny_model):
    (lora,) = distill(settings(mode="lora", adamw_lr=0.01))
    assert lora.name == "tiny-distilled-lora-4.safetensors"
    base = load_transformer(open_checkpoint(tiny_model))
    fused = load_transformer(open_checkpoint(tiny_model))
    fuse(fused, [(open_lora(lora), 1.0)])
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), fused.parameters(), strict=True)
    )
    config = settings(mode="lora")
    maker = TaskMaker.open(config)
    networks = build_networks(config, maker.models)
    for change in networks.weights["student"]:
        torch.nn.init.normal_(change.up)
    task = maker.draw(np.random.default_rng(0), 2)
    x = task.start(torch.Generator())
    levels = schedulers.distilled(4)
    with torch.no_grad():
        ours = task.denoiser(networks.student, levels, is_guided=False)(x, 0.9)
        teachers = task.denoiser(networks.teacher, levels, is_guided=False)(x, 0.9)
        bases = task.denoiser(base, levels, is_guided=False)(x, 0.9)
    assert torch.equal(teachers.video, bases.video)
    assert not torch.allclose(ours.video, bases.video)


def test_the_student_comes_nearer_to_the_guided_teacher(settings, tmp_path: Path):
    config = settings(
        trajectory_steps=25, matching_steps=0, eval_every=25, ema_decay=0.9,
        muon_lr=5e-3, adamw_lr=2e-3, first_frame_p=0.0, guidance={"cfg_scale": 8},
    )  # fmt: skip
    maker = TaskMaker.open(config)
    networks = build_networks(config, maker.models)
    before = script.held_out_distance(maker, networks)(networks.average)
    distill(config)
    lines = (config.output_dir / "log.jsonl").read_text().splitlines()
    after = json.loads(lines[-1])
    assert after["far_video"] < 0.7 * before["far_video"]


def test_the_nearest_change_of_a_rank_is_exact_where_the_rank_suffices():
    change = LowRank(torch.randn(3, 8), torch.randn(6, 3))
    whole = change.up @ change.down
    found = nearest(whole, 3)
    assert torch.allclose(found.up @ found.down, whole, atol=1e-5)
    less = nearest(whole, 2)
    left_out = torch.linalg.svdvals(whole)[2]
    assert torch.allclose(
        torch.linalg.matrix_norm(whole - less.up @ less.down), left_out, atol=1e-4
    )


def test_what_cannot_be_distilled_is_said_in_a_sentence(settings, tmp_path: Path, tiny_model: Path):
    distilled = publish(open_checkpoint(tiny_model), CHANGE, tmp_path, rank=2)[0]
    with pytest.raises(InputError, match="is distilled already; give the -dev model"):
        TaskMaker.open(
            settings(
                model=str(distilled), text_encoder_path=str(tiny_model.parent / "text_encoder")
            )
        )
    with pytest.raises(InputError, match="set false"):
        TaskMaker.open(settings(mode="lora", compile=True))
    path = tmp_path / "config.yaml"
    path.write_text("latents: nowhere\noutput_dir: out\nmatchin_steps: 3\n")
    result = CliRunner().invoke(distill_app, [str(path)])
    assert result.exit_code == 2
    assert "unknown key matchin_steps; did you mean matching_steps?" in result.output


CHANGE = {"transformer_blocks.0.attn1.to_q": torch.ones(24, 24)}
