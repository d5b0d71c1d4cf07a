"""A model's published variants made from its `dev` file: fp8, distilled, both."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.convert import convert
from aiprod_core.loader.lora import open_lora
from aiprod_pipelines import companions
from aiprod_pipelines.model_files import resolve_model
from aiprod_pipelines.request import LoraFile

VARIANTS = ("dev", "dev-fp8", "distilled", "distilled-fp8")


def convert_variants(
    model: str,
    folder: Path,
    variants: Sequence[str],
    *,
    distilled_lora: LoraFile | None = None,
    loras: Sequence[LoraFile] = (),
) -> list[Path]:
    """Writes `NAME-VARIANT.safetensors` for each variant, with `loras` added to all of them, and
    the model's text encoder beside them where it has one.

    Raises InputError, before anything is written, for an unknown variant, a file that is there
    already, and a distilled variant without its LoRA.
    """
    checkpoint = open_checkpoint(*resolve_model(model))
    is_distilled = companions.is_distilled(checkpoint)
    added = [(open_lora(file.path), file.strength) for file in loras]
    jobs = []
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"variant must be one of {', '.join(VARIANTS)}; got {variant}.")
        if variant.startswith("dev") and is_distilled:
            raise InputError(f"{checkpoint.name} is distilled: no dev variant can be made of it.")
        path = folder / f"{companions.model_name(checkpoint)}-{variant}.safetensors"
        if path.exists():
            raise InputError(f"{path}: is there already; remove it or give another folder.")
        adapters = list(added)
        if variant.startswith("distilled") and not is_distilled:
            file = companions.distilled_lora(checkpoint, distilled_lora)
            adapters.append((open_lora(file.path), file.strength))
        jobs.append((path, variant, adapters))
    folder.mkdir(parents=True, exist_ok=True)
    for path, variant, adapters in jobs:
        convert(
            checkpoint,
            path,
            to_fp8_weights=variant.endswith("fp8"),
            adapters=adapters,
            metadata={"distilled": True} if variant.startswith("distilled") else None,
        )
    encoder = checkpoint.paths[0].parent / "text_encoder"
    if encoder.is_dir() and not (folder / "text_encoder").exists():
        shutil.copytree(encoder, folder / "text_encoder")
    return [path for path, _, _ in jobs]
