"""The training loop: it learns what it is given, resumes exactly and stops in time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import aiprod_trainer.train as train_module
from aiprod_core.errors import InputError
from aiprod_trainer import checkpoints
from aiprod_trainer.modes import MODES
from aiprod_trainer.train import train


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "state.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_and_saves(configure, mode):
    last = train(configure(training_strategy={"name": mode}, optimization={"steps": 1}))
    trained = load_file(last / "lora.safetensors")
    assert any(value.abs().max() > 0 for name, value in trained.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "optimization",
    [
        {"optimizer_type": "adamw", "ema_decay": 0.9},
        {"optimizer_type": "muon"},
        {"optimizer_type": "schedule_free", "scheduler_type": "constant"},
    ],
)
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(
    configure, optimization, monkeypatch
):
    settings = {"optimization": {"steps": 6, **optimization}, "checkpoints": {"interval": 2}}
    settings["lora"] = {"rank": 12, "dropout": 0.2}
    whole = train(configure("whole", **settings))
    real = checkpoints.write_checkpoint

    def stop_after_two(folder, step, *rest):
        path = real(folder, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return path

    monkeypatch.setattr(checkpoints, "write_checkpoint", stop_after_two)
    stopped = train(configure("broken", **settings))
    monkeypatch.undo()
    assert stopped.name == "step-000002"
    assert_same(state_of(whole), state_of(train(configure("broken", **settings))))


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from aiprod_trainer import checkpoints
from aiprod_trainer.train import train
from aiprod_trainer.training_config import read_training_config

real = checkpoints.save_state

def half_written(path, tensors, step, facts):
    if step < 4:
        return real(path, tensors, step, facts)
    path.write_bytes(b"half of a file")
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save_state = half_written
train(read_training_config(Path(sys.argv[1])))
"""


def test_a_process_killed_while_it_writes_a_checkpoint_resumes_exactly(configure, tmp_path):
    settings = {"optimization": {"steps": 6}, "checkpoints": {"interval": 2}}
    whole = train(configure("whole", **settings))
    broken = configure("broken", **settings)
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "broken.yaml")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    latest = checkpoints.latest(broken.output_dir)
    assert latest is not None and latest.name == "step-000002"
    assert_same(state_of(whole), state_of(train(broken)))


def test_only_the_last_checkpoints_are_kept(configure):
    config = configure(checkpoints={"interval": 1, "keep_last_n": 2})
    train(config)
    kept = sorted(path.name for path in (config.output_dir / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]


def test_the_loss_falls_on_clips_seen_again_and_again(configure):
    config = configure(
        optimization={"steps": 30, "learning_rate": 0.05, "scheduler_type": "constant"},
        flow_matching={"timestep_sampling_mode": "uniform"},
        lora={"target_modules": ["to_q", "to_v", "to_out.0", "ff.net.2", "audio_ff.net.2"]},
        log_interval=10,
    )
    train(config)
    losses = losses_of(config.output_dir)
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(configure, monkeypatch):
    config = configure(checkpoints={"interval": 1})
    real = train_module.losses_of

    def broken_from_step_2(model, examples):
        losses = real(model, examples)
        latest = checkpoints.latest(config.output_dir)
        is_late = latest is not None and latest.name == "step-000002"
        return {k: v * float("nan") if is_late else v for k, v in losses.items()}

    monkeypatch.setattr(train_module, "losses_of", broken_from_step_2)
    with pytest.raises(InputError, match=r"the loss is nan at step 2.*step-000002"):
        train(config)
    assert checkpoints.latest(config.output_dir).name == "step-000002"


def test_accumulated_batches_give_the_gradient_of_one_large_batch(configure):
    large = train(configure("large", optimization={"steps": 1, "batch_size": 4}))
    settings = {"steps": 1, "batch_size": 2, "gradient_accumulation_steps": 2}
    small = train(configure("small", optimization=settings))
    a, b = state_of(large), state_of(small)
    slots = [key for key in a if key.endswith("exp_avg")]
    assert slots
    for key in slots:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-7)


def test_recomputed_swapped_and_prefetched_training_is_the_same_training(configure):
    plain = train(configure("plain"))
    fitted = train(
        configure(
            "fitted",
            acceleration={"blocks_to_swap": 1},
            optimization={"enable_gradient_checkpointing": True},
            data={"num_dataloader_workers": 1},
        )
    )
    a, b = state_of(plain), state_of(fitted)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scheme", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantised_base_is_trained_on(configure, scheme, package):
    pytest.importorskip(package)
    last = train(configure(acceleration={"quantization": scheme}, optimization={"steps": 2}))
    trained = load_file(last / "lora.safetensors")
    assert all(value.abs().max() > 0 for name, value in trained.items() if "lora_B" in name)


def test_full_fine_tuning_saves_a_model_that_pipelines_open(configure, tiny_model):
    from aiprod_pipelines.components import ModelSet

    last = train(configure(model={"training_mode": "full"}, optimization={"steps": 2}))
    (last / "text_encoder").symlink_to(tiny_model.parent / "text_encoder")
    models = ModelSet.open(last / "model.safetensors")
    with models.transformer() as transformer:
        weight = transformer.transformer_blocks[0].attn1.to_q.weight
    state = state_of(last)["model/transformer_blocks.0.attn1.to_q.weight"]
    assert torch.equal(weight, state)
    with safe_open(tiny_model, framework="pt") as file:
        key = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
        assert not torch.equal(weight, file.get_tensor(key))


def test_a_run_folder_with_checkpoints_is_not_started_over(configure):
    train(configure(optimization={"steps": 1}))
    with pytest.raises(InputError, match="has checkpoints up to step-000001"):
        train(configure(optimization={"steps": 2}), resume=False)


def test_another_rank_does_not_resume(configure):
    train(configure(optimization={"steps": 1}))
    with pytest.raises(InputError, match="does not fit the configuration"):
        train(configure(lora={"rank": 5}))


def test_training_goes_on_from_a_lora_file(configure):
    first = train(configure("first", lora={"alpha": 2}))
    again = train(
        configure(
            "again",
            model={"load_checkpoint": str(first)},
            optimization={"steps": 1, "learning_rate": 1e-12},
        )
    )
    a, b = load_file(first / "lora.safetensors"), load_file(again / "lora.safetensors")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)


def test_losses_are_told_apart_by_noise_level(configure):
    config = configure(flow_matching={"joint_share": 0.5, "clean_share": 0.25})
    train(config)
    line = json.loads((config.output_dir / "log.jsonl").read_text().splitlines()[-1])
    assert any(key.startswith("video_loss/sigma 0.") for key in line)
    assert line["loss"] == pytest.approx(line["video_loss"] + line["audio_loss"])
