"""Files that belong to a model and lie beside it by their names: upsampler, LoRAs, tiny decoder.

    ltx-2-19b-dev.safetensors                    the model
    ltx-2-19b-distilled.safetensors              the same, distilled
    ltx-2-19b-distilled-lora-384.safetensors     what turns the first into the second
    ltx-2-spatial-upscaler-x2-1.0.safetensors    shared by all of a generation

What a pipeline needs and neither lies there nor is given is an InputError that names both ways,
before any weight is read.
"""

import re
from pathlib import Path

import torch

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint
from aiprod_core.loader.lora import Lora, check_shapes, coverage, open_lora
from aiprod_core.model.reward import RewardConfig
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.upsampler import UpsamplerConfig
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_pipelines.request import LoraFile

# What follows the model's own name in a file's.
VARIANT = re.compile(r"-(dev|distilled|fp8|bf16)\b.*$")


def model_name(checkpoint: Checkpoint) -> str:
    """The file's name without its variant: `ltx-2-19b-dev-fp8.safetensors` is `ltx-2-19b`."""
    return VARIANT.sub("", checkpoint.paths[0].stem)


def find_beside(checkpoint: Checkpoint, suffix: str) -> Path | None:
    """`NAME-SUFFIX*.safetensors` beside the model, or with a shorter NAME; the last by version."""
    parts = model_name(checkpoint).split("-")
    while parts:
        pattern = f"{'-'.join(parts)}-{suffix}*.safetensors"
        found = sorted(checkpoint.paths[0].parent.glob(pattern))
        if found:
            return found[-1]
        parts.pop()
    return None


def is_distilled(checkpoint: Checkpoint) -> bool:
    """By the published file name, or by `distilled` in the header's metadata."""
    return "distilled" in checkpoint.name or bool(checkpoint.metadata.get("distilled"))


def spatial_upsampler(checkpoint: Checkpoint, given: Path | None) -> Path:
    """The x2 upsampler of this model's latents, given or found."""
    path = given or find_beside(checkpoint, "spatial-upscaler-x2")
    if path is None:
        raise InputError(
            f"the second stage needs an upsampler: {model_name(checkpoint)}-spatial-upscaler-x2"
            f".safetensors is not in {checkpoint.paths[0].parent}; give it with "
            "--spatial-upsampler-path, or use --pipeline one-stage."
        )
    config = UpsamplerConfig.from_metadata(open_checkpoint(path).config)
    if config.temporal_upsample or config.spatial_scale != 2:
        raise InputError(f"{path}: the second stage needs a spatial x2 upsampler; this is another.")
    channels = checkpoint.section("transformer").get("in_channels", 128)
    if config.in_channels != channels:
        raise InputError(
            f"{path}: upsamples latents of {config.in_channels} channels, the model's have "
            f"{channels}; give the upsampler that was published with the model."
        )
    return path


def tiny_decoder(checkpoint: Checkpoint) -> Path:
    """The small decoder of this model's latents, for previews."""
    path = find_beside(checkpoint, "tiny-decoder")
    if path is None:
        raise InputError(
            f"decoder tiny: {model_name(checkpoint)}-tiny-decoder.safetensors is not in "
            f"{checkpoint.paths[0].parent}; put it there (aiprod_trainer.train_tiny_decoder makes "
            "one), or use --decoder full."
        )
    config = VideoVAEConfig.from_metadata(open_checkpoint(path).section("vae"))
    own = VideoVAEConfig.from_metadata(checkpoint.section("vae"))
    if (config.latent_channels, config.scale) != (own.latent_channels, own.scale):
        raise InputError(f"{path}: decodes other latents than {checkpoint.name} has.")
    return path


def distilled_lora(checkpoint: Checkpoint, given: LoraFile | None) -> LoraFile:
    """What makes the model denoise in few steps without guidance, given or found."""
    if given is not None:
        return given
    path = find_beside(checkpoint, "distilled-lora")
    if path is not None:
        return LoraFile(path)
    name = model_name(checkpoint)
    raise InputError(
        f"{checkpoint.name} is not a distilled model: neither {name}-distilled-lora.safetensors "
        f"is in {checkpoint.paths[0].parent}, nor is one given; give a distilled checkpoint "
        f"({name}-distilled.safetensors) with --model, or its LoRA with --distilled-lora."
    )


def reward_model(checkpoint: Checkpoint, given: Path | None) -> Path:
    """What judges this model's latents, given or found."""
    path = given or find_beside(checkpoint, "reward")
    if path is None:
        name = model_name(checkpoint)
        raise InputError(
            f"{checkpoint.name} has no reward model to judge its clips: {name}-reward.safetensors "
            f"is not in {checkpoint.paths[0].parent}; train one with aiprod reward train and put "
            "it there, or leave out --best-of."
        )
    config = RewardConfig.from_metadata(open_checkpoint(path).section("reward"))
    channels = checkpoint.section("vae").get("latent_channels", 128)
    if config.video_channels != channels:
        raise InputError(
            f"{path}: judges latents of {config.video_channels} channels, the model's have "
            f"{channels}; give the reward model that was trained with it."
        )
    return path


def ic_lora(checkpoint: Checkpoint, kind: str) -> LoraFile:
    """The published IC-LoRA of a kind of control, whoever makes its signal."""
    kind = kind.removesuffix("-made")
    suffix = {"detailer": "ic-lora-detailer"}.get(kind, f"ic-lora-{kind}-control")
    path = find_beside(checkpoint, suffix)
    if path is not None:
        return LoraFile(path)
    raise InputError(
        f"control {kind} needs its IC-LoRA: {model_name(checkpoint)}-{suffix}.safetensors is not "
        f"in {checkpoint.paths[0].parent}; give it with --lora."
    )


def camera_lora(checkpoint: Checkpoint, camera: str) -> LoraFile:
    """The published LoRA of a camera movement."""
    suffix = f"lora-camera-control-{camera}"
    path = find_beside(checkpoint, suffix)
    if path is not None:
        return LoraFile(path)
    raise InputError(
        f"camera {camera} needs its LoRA: {model_name(checkpoint)}-{suffix}.safetensors is not in "
        f"{checkpoint.paths[0].parent}; put it there, or give another file with --lora."
    )


def check_lora(checkpoint: Checkpoint, file: LoraFile) -> Lora:
    """Opens a LoRA. Raises InputError when it is not for this model, from headers alone."""
    if not file.path.is_file():
        raise InputError(f"{file.path}: no such file; --lora takes a .safetensors file.")
    try:
        lora = open_lora(file.path)
    except CheckpointError:
        if _holds_a_model(file.path):
            raise InputError(f"{file.path}: a whole model, not a LoRA; try --model.") from None
        raise
    with torch.device("meta"):
        transformer = Transformer(
            TransformerConfig.from_metadata(checkpoint.section("transformer"))
        )
    covered = coverage(transformer, lora)
    if covered.unmatched:
        raise InputError(
            f"{file.path}: {len(covered.unmatched)} of its "
            f"{len(covered.matched) + len(covered.unmatched)} layers are not in "
            f"{checkpoint.name}, such as {covered.unmatched[0]}; it is for another model."
        )
    check_shapes(transformer, lora)
    return lora


def _holds_a_model(path: Path) -> bool:
    return any(key.startswith("model.diffusion_model.") for key in open_checkpoint(path).tensors)
