"""What a training gives away: weights under published names, and a hub repository with a card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint
from aiprod_trainer.adapters import save_lora
from aiprod_trainer.training_config import TrainingConfig

FILES = {"lora": "lora.safetensors", "full": "model.safetensors"}


def publish_weights(
    folder: Path,
    config: TrainingConfig,
    base: Checkpoint,
    trained: Mapping[str, Tensor],
    reference_factors: tuple[int, int],
) -> None:
    """A LoRA file, or the whole model with the trained weights in their places.

    A LoRA names its base, and an IC-LoRA how much smaller its references are.
    """
    dtype = getattr(torch, config.checkpoints.precision)
    path = folder / FILES[config.model.training_mode]
    if config.model.training_mode == "lora":
        metadata = {"base_model": base.name}
        names = ("reference_downscale_factor", "reference_temporal_scale_factor")
        for name, factor in zip(names, reference_factors, strict=True):
            if factor != 1:
                metadata[name] = str(factor)
        scale = config.lora.alpha / config.lora.rank
        save_lora(path, trained, scale=scale, dtype=dtype, metadata=metadata)
        return
    published = {key_maps.TRANSFORMER.publish(name): value for name, value in trained.items()}
    kept = base.read(key for key in base.tensors if key not in published)
    published = {key: value.to(dtype).contiguous() for key, value in published.items()}
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in base.metadata.items()}
    save_file(kept | published, path, metadata=text)


def push_to_hub(config: TrainingConfig, checkpoint: Path, base: Checkpoint, api: Any = None) -> str:
    """Uploads the weights, the configuration and a card; returns the repository's address.

    `api` is a huggingface_hub.HfApi. Raises InputError without a repository's name.
    """
    if config.hub.hub_model_id is None:
        raise InputError("hub.push_to_hub needs hub.hub_model_id, such as name/my-lora.")
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    (checkpoint / "README.md").write_text(model_card(config, checkpoint, base))
    repository = api.create_repo(config.hub.hub_model_id, exist_ok=True)
    api.upload_folder(
        repo_id=config.hub.hub_model_id,
        folder_path=str(checkpoint),
        ignore_patterns=["state.safetensors"],
        commit_message=f"Upload {checkpoint.name}",
    )
    return str(repository)


def model_card(config: TrainingConfig, checkpoint: Path, base: Checkpoint) -> str:
    """What it is, how to use it, and the settings that made it."""
    name = (config.hub.hub_model_id or checkpoint.parent.parent.name).rpartition("/")[2]
    is_lora = config.model.training_mode == "lora"
    front = yaml.safe_dump(
        {
            "base_model": config.model.model_path,
            "pipeline_tag": "text-to-video",
            "tags": ["ltx-2", "aiprod", *(["lora"] if is_lora else [])],
        },
        sort_keys=False,
    )
    prompts = [sample.prompt for sample in config.validation.samples]
    prompt = [*prompts, *config.validation.prompts, "a prompt like the training captions"][0]
    use = (
        f'aiprod generate "{prompt}" --model {config.model.model_path} --lora lora.safetensors'
        if is_lora
        else f'aiprod generate "{prompt}" --model model.safetensors'
    )
    settings = config.optimization
    what = f"LoRA of rank {config.lora.rank} for" if is_lora else "full fine-tuning of"
    rows = {
        "mode": config.training_strategy.name,
        "steps": int(checkpoint.name.removeprefix("step-")),
        "batch": settings.batch_size * settings.gradient_accumulation_steps,
        "optimiser": f"{settings.optimizer_type}, learning rate {settings.learning_rate:g}",
        "precision": config.acceleration.mixed_precision_mode,
        "seed": config.seed,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
{front}---

# {name}

A {what} {base.name}, trained with AIPROD.

```
{use}
```

| setting | value |
|---|---|
{table}

The whole configuration is in `config.yaml`.
"""
