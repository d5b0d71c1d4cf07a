"""Two processes over gloo do what one does with the doubled batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aiprod_trainer import checkpoints
from aiprod_trainer.train import train


def train_on_two_processes(path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "aiprod_trainer.cli", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]


def last_of(config) -> Path:
    last = checkpoints.latest(config.output_dir)
    assert last is not None
    return last


@pytest.mark.parametrize(
    ("mode", "distributed"), [("lora", "ddp"), ("full", "fsdp")], ids=["ddp", "fsdp"]
)
def test_two_processes_have_the_gradients_of_one_with_the_doubled_batch(
    configure, tmp_path, mode, distributed
):
    settings = {"model": {"training_mode": mode}}
    optimization = {"steps": 1, "learning_rate": 1e-3}
    acceleration = {"distributed": distributed}
    shared = configure(
        "shared",
        **settings,
        acceleration=acceleration,
        optimization={"batch_size": 2, **optimization},
    )
    train_on_two_processes(tmp_path / "shared.yaml")
    alone = train(configure("alone", **settings, optimization={"batch_size": 4, **optimization}))
    a, b = load_file(alone / "state.safetensors"), load_file(last_of(shared) / "state.safetensors")
    # After one step the first moment is the gradient, up to a factor.
    gradients = [key for key in a if key.endswith("exp_avg")]
    assert gradients and a.keys() == b.keys()
    for key in gradients:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-7)
    if mode == "full":  # one consolidated file, under the names of the base
        name = "model.safetensors"
        whole, gathered = load_file(alone / name), load_file(last_of(shared) / name)
        assert whole.keys() == gathered.keys()
        assert all(whole[key].shape == gathered[key].shape for key in whole)
        # A process alone goes on from what two have written.
        train(
            configure(
                "shared",
                **settings,
                optimization={"batch_size": 4, **optimization, "steps": 2},
            )
        )
        assert last_of(shared).name == "step-000002"
