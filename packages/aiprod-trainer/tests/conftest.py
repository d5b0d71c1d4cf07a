"""A tiny model with a data set of random latents, and a configuration that trains on them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from aiprod_trainer.training_config import TrainingConfig, read_training_config

PIPELINES_CONFTEST = Path(__file__).parents[2] / "aiprod-pipelines/tests/conftest.py"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipelines' tiny model: 2 blocks, width 24, latents of 8 channels."""
    spec = importlib.util.spec_from_file_location("pipelines_conftest", PIPELINES_CONFTEST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.save_tiny_model(tmp_path_factory.mktemp("model"))


def save_part(path: Path, *, clips: int = 6, seed: int = 0, size: int = 3, **changes: Any) -> None:
    """A part of random latents: 3 latent frames of `size` x `size`, 18 sound frames, hidden text.

    `changes` replace a tensor, or drop it where they are None.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    lengths = torch.randint(3, 9, (clips * 2,), generator=generator, dtype=torch.int32)
    tensors = {
        "video": random(clips, 8, 3, size, size),
        "audio": random(clips, 2, 18, 16),
        "hidden": random(int(lengths.sum()), 8, 3),
        "lengths": lengths,
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"fps": "12"})
    captions = [json.dumps(["a red ball", "a ball"])] * clips
    path.with_suffix(".jsonl").write_text("\n".join(captions) + "\n")


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bucket of 6 clips with two captions each, references and masks."""
    folder = tmp_path_factory.mktemp("latents")
    save_part(
        folder / "part-00000.safetensors",
        reference_latents=torch.randn(6, 8, 3, 3, 3).half(),
        reference_audio_latents=torch.randn(6, 2, 10, 16).half(),
        video_masks=(torch.rand(6, 3, 3, 3) < 0.5).half(),
        audio_masks=(torch.rand(6, 18) < 0.5).half(),
        rejected_video=torch.randn(6, 8, 3, 3, 3).half(),
        rejected_audio=torch.randn(6, 2, 18, 16).half(),
    )
    return folder


Configure = Callable[..., TrainingConfig]


@pytest.fixture
def configure(tiny_model: Path, latents: Path, tmp_path: Path) -> Configure:
    """Builds a configuration; keyword arguments override sections, such as lora={"rank": 2}."""

    def build(name: str = "run", **sections: Any) -> TrainingConfig:
        values: dict[str, Any] = {
            "model": {"model_path": str(tiny_model)},
            "lora": {"rank": 4, "alpha": 4, "target_modules": ["to_q", "to_k"]},
            "training_strategy": {"first_frame_conditioning_p": 0.5},
            "optimization": {
                "learning_rate": 0.01,
                "steps": 4,
                "batch_size": 2,
                "enable_gradient_checkpointing": False,
            },
            "acceleration": {"device": "cpu", "mixed_precision_mode": "no"},
            "data": {"preprocessed_data_root": str(latents), "num_dataloader_workers": 0},
            "checkpoints": {"precision": "float32"},
            "tensorboard": {"enabled": False},
            "output_dir": str(tmp_path / name),
            "log_interval": 2,
        }
        for section, changes in sections.items():
            old = values.get(section)
            is_section = isinstance(old, dict) and isinstance(changes, dict)
            values[section] = old | changes if is_section else changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return read_training_config(path)

    return build


@pytest.fixture(scope="session")
def make_part() -> Callable[..., None]:
    return save_part
