"""Does a training that is killed while it writes a checkpoint end where an unbroken one does?

    python benchmarks/resume_exact.py --model nano --json resume_exact.json

Trains a LoRA for 40 steps; trains the same for 20, killed (SIGKILL) in the middle of writing the
checkpoint of step 20, and resumes it to 40. The data are random latents of the model's shapes; each
run is a process of its own. `identical` says whether all tensors of both final states, weights and
optimiser, are equal bit for bit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from aiprod_pipelines.components import ModelSet
from aiprod_trainer import checkpoints
from aiprod_trainer.train import train
from aiprod_trainer.training_config import read_training_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kill-at", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # a child's configuration
    parser.add_argument("--is-killed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run(options.run, options.kill_at if options.is_killed else None)
        return
    result = measure(options)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, object]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_latents(folder / "data", options.model)
        whole, broken = (write_config(folder, run, options) for run in ("whole", "broken"))
        start_child(whole, options)
        code = start_child(broken, options, is_killed=True)
        latest = checkpoints.latest(folder / "broken")
        half_written = any((folder / "broken/checkpoints").glob("*.tmp"))
        start_child(broken, options)
        states = [
            load_file(checkpoints.folder_of(folder / run, options.steps) / "state.safetensors")
            for run in ("whole", "broken")
        ]
    differing = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    return {
        "model": options.model,
        "steps": options.steps,
        "identical": states[0].keys() == states[1].keys() and not differing,
        "tensors": len(states[0]),
        "killed_by_signal": -code,
        "a_checkpoint_was_half_written": half_written,
        "resumed_from": latest.name if latest else None,
        "seconds": round(time.monotonic() - started, 1),
    }


def start_child(config: Path, options: argparse.Namespace, *, is_killed: bool = False) -> int:
    command = [sys.executable, __file__, "--run", str(config), "--kill-at", str(options.kill_at)]
    done = subprocess.run([*command, *(["--is-killed"] if is_killed else [])])
    if done.returncode != 0 and not is_killed:
        raise SystemExit(f"{config}: the training failed with code {done.returncode}")
    return done.returncode


def run(config: Path, kill_at: int | None) -> None:
    """A child: trains, and dies with half a file written where it is told to."""
    real = checkpoints.save_state

    def half_written(path: Path, tensors, step: int, facts) -> None:
        real(path, tensors, step, facts)
        if step == kill_at:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_state = half_written
    train(read_training_config(config))


def write_config(folder: Path, run: str, options: argparse.Namespace) -> Path:
    path = folder / f"{run}.yaml"
    settings = {
        "model": {"model_path": options.model},
        "lora": {"rank": 8, "alpha": 8, "dropout": 0.1},
        "training_strategy": {"first_frame_conditioning_p": 0.5},
        "optimization": {"steps": options.steps, "batch_size": 2, "ema_decay": 0.99},
        "acceleration": {"device": "cpu", "mixed_precision_mode": "no"},
        "data": {"preprocessed_data_root": str(folder / "data"), "frame_rate": 12},
        "checkpoints": {"interval": options.kill_at // 2, "keep_last_n": -1},
        "tensorboard": {"enabled": False},
        "output_dir": str(folder / run),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def save_random_latents(folder: Path, model: str) -> None:
    """A part of 8 clips of the model's own size."""
    models = ModelSet.open(model, device="cpu")
    profile, audio = models.profile, models.audio_config
    generator = torch.Generator().manual_seed(0)
    frames = (profile.num_frames - 1) // profile.scale.time + 1
    height, width = profile.height // profile.scale.height, profile.width // profile.scale.width
    moments = round(profile.num_frames / profile.frame_rate * audio.latents_per_second)
    with models.text_encoder() as encoder:
        hidden, mask = encoder.encode(["a red ball bounces"] * 8)
    channels = models.transformer_config.in_channels
    tensors = {
        "video": torch.randn(8, channels, frames, height, width, generator=generator),
        "audio": torch.randn(
            8, audio.z_channels, moments, audio.latent_mel_bins, generator=generator
        ),
        "hidden": hidden[mask.bool()],
        "lengths": mask.sum(dim=1).int(),
    }
    folder.mkdir()
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()},
        folder / "part-00000.safetensors",
        metadata={"fps": str(profile.frame_rate)},
    )


if __name__ == "__main__":
    main()
