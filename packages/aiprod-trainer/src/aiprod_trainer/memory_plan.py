"""What a training takes of a card, from the checkpoint's header alone: `aiprod train --plan`.

Weights, gradients and optimiser state are counted tensor by tensor. Activations are counted by
running the network once, narrow and short, on the CPU, and adding up what autograd keeps; they grow
with tokens x width. What is not counted is in RESERVE: the CUDA context, the workspace of the
matrix library, gaps between allocations.

Letters: N tokens, D width.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint
from aiprod_core.loader.networks import AUDIO_PARTS, SOUND_PARTS
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_core.types import Modality, VideoShape
from aiprod_trainer.adapters import attach, target_layers
from aiprod_trainer.modes import tensor_name
from aiprod_trainer.train import TEXT_LENGTHS, base_dtype, open_data, open_model
from aiprod_trainer.training_config import LoraSection, TrainingConfig

GIB = 2**30
RESERVE = 1.2 * GIB
DECODING = 1.5 * GIB  # beside the decoder's weights, in validation; tiles are made to fit
# Bytes a parameter of the optimiser's state, beside the parameter and its gradient.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "muon": 4.0, "schedule_free": 8.0}
# Bytes a weight of the blocks' linear layers, scales included.
QUANTIZED_BYTES = {"int8": 1.01, "nf4": 0.5625}
# Tensors (N, D) that the backward pass of a block holds beside what the forward pass kept: the
# gradients of the feed-forward's two hidden layers, 4 D wide, and of the streams.
BACKWARD_TENSORS = 12
CARDS = (2, 4, 8, 16, 32, 64)  # that share one network


class Tokens(NamedTuple):
    """One sample's; 0 for a stream that takes no part."""

    video: int
    audio: int
    text: int


@dataclass(frozen=True)
class Plan:
    """Bytes on one card."""

    weights: float
    trained: float  # adapters; 0 where the weights themselves are trained
    gradients: float
    optimizer: float
    activations: float
    reserve: float
    in_ram: float = 0.0  # not on the card

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "in_ram")

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights),
            ("adapters and averages", self.trained),
            ("gradients", self.gradients),
            ("optimiser state", self.optimizer),
            ("activations", self.activations),
            ("reserve", self.reserve),
            ("total", self.total),
        ]
        lines = [f"{name:<22} {size / GIB:7.2f} GiB" for name, size in rows]
        if self.in_ram:
            lines.append(f"{'in RAM (swapped)':<22} {self.in_ram / GIB:7.2f} GiB")
        return "\n".join(lines)


def plan_training(config: TrainingConfig) -> str:
    """The plan in words. Raises InputError where it cannot fit, with the smallest change that
    would."""
    checkpoint = open_model(config)
    return check_plan(config, checkpoint, longest_sample(config, checkpoint))


def check_plan(config: TrainingConfig, checkpoint: Checkpoint, tokens: Tokens) -> str:
    plan = make_plan(config, checkpoint, tokens)
    budget = budget_of(config)
    kinds = [f"{n} {name}" for n, name in zip(tokens, ("video", "audio", "text"), strict=True)]
    text = f"{plan}\n{'card':<22} {budget / GIB:7.2f} GiB, for {', '.join(kinds)} tokens a sample"
    if plan.total <= budget:
        return text
    changes = smallest_change(config, checkpoint, tokens, budget)
    remedy = (
        f"set {' and '.join(changes)}."
        if changes
        else "no setting makes it fit; take a larger card, or shorter and smaller clips."
    )
    raise InputError(
        f"the training takes {plan.total / GIB:.1f} GiB of the {budget / GIB:.1f} that there are: "
        f"{remedy}\n{text}"
    )


def budget_of(config: TrainingConfig) -> float:
    """Of one card: what the configuration says, else the one that is here, else the RAM."""
    if config.acceleration.memory_gb is not None:
        return config.acceleration.memory_gb * GIB
    if torch.cuda.is_available() and config.acceleration.device in (None, "cuda"):
        return float(torch.cuda.mem_get_info()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def longest_sample(config: TrainingConfig, checkpoint: Checkpoint) -> Tokens:
    """The data set's largest bucket, or validation's clip where the data are not there yet."""
    folder = config.data.preprocessed_data_root
    section = checkpoint.config.get("text_encoder") or {"type": "gemma3"}
    text = int(section.get("max_length") or TEXT_LENGTHS[section["type"]])
    if any(folder.glob("part-*.safetensors")):
        data = open_data(config, checkpoint)
        samples = [_tokens_of(config, bucket.shapes, text) for bucket in data.buckets]
        return max(samples, key=lambda tokens: tokens.video + tokens.audio)
    dims, fps = config.validation.video_dims, config.validation.frame_rate or 24.0
    if dims is None:
        raise InputError(
            f"{folder}: no data yet; set validation.video_dims to plan for clips of that size."
        )
    width, height, num_frames = dims
    shape = VideoShape(1, num_frames, height, width, fps)
    latent = shape.latent(1, VideoVAEConfig.from_metadata(checkpoint.section("vae")).scale)
    audio = AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
    sound = shape.audio_latent(1, 1, audio.latents_per_second)
    shapes = {"video": tuple(latent[1:]), "audio": (1, sound.frames, 1)}
    for name in ("reference_latents", *_references(config)):
        shapes[name] = shapes["video"]
    return _tokens_of(config, shapes, text)


def _references(config: TrainingConfig) -> list[str]:
    video = config.mode.video
    conditions = () if video is None else video.conditions
    return [
        tensor_name("video", c.latents_dir, "reference")
        for c in conditions
        if c.type == "reference"
    ]


def _tokens_of(config: TrainingConfig, shapes: dict[str, tuple[int, ...]], text: int) -> Tokens:
    def count(shape: tuple[int, ...]) -> int:
        return int(torch.Size(shape[1:]).numel())

    mode = config.mode
    video = audio = 0
    if mode.video is not None:
        names = [tensor_name("video", mode.video.latents_dir), *_references(config)]
        video = sum(count(shapes[name]) for name in names)
    if mode.audio is not None:
        audio = shapes[tensor_name("audio", mode.audio.latents_dir)][1]
        has_reference = any(c.type == "reference" for c in mode.audio.conditions)
        audio += audio * has_reference
    return Tokens(video, audio, text)


# Counting.


def make_plan(config: TrainingConfig, checkpoint: Checkpoint, tokens: Tokens) -> Plan:
    acceleration, settings = config.acceleration, config.optimization
    is_lora = config.model.training_mode == "lora"
    shapes = transformer_shapes(config, checkpoint)
    in_block, outside, per_layer = _weight_bytes(config, checkpoint, shapes)
    swapped = min(acceleration.blocks_to_swap, len(per_layer))
    in_ram = sum(per_layer[:swapped])
    weights = in_block + outside - in_ram + (max(per_layer) if swapped else 0.0)
    connectors = _projector_bytes(config, checkpoint)
    if is_lora:
        layers = _target_shapes(config, shapes)
        trained = sum(config.lora.rank * (out + into) for out, into in layers)
    else:
        trained = sum(torch.Size(shape).numel() for shape in shapes.values())
    copies = is_lora + (settings.ema_decay is not None)  # float32, beside the weights
    shards, gathered = 1, 0.0
    if acceleration.distributed == "fsdp" and acceleration.num_processes > 1:
        shards = acceleration.num_processes
        # Two blocks are whole at a time: the one that computes and the one that is fetched.
        gathered = 2 * max(per_layer) * (0.5 if not is_lora else 1.0)
    activations = _activation_bytes(config, checkpoint, tokens)
    decoder = sum(
        torch.Size(info.shape).numel() * 2
        for key, info in checkpoint.tensors.items()
        if key_maps.VIDEO_DECODER.rename(key) is not None
    )
    has_validation = config.validation.interval and (
        config.validation.samples or config.validation.prompts
    )
    if has_validation:
        activations = max(activations, decoder + DECODING)
    return Plan(
        weights=weights / shards + gathered + connectors,
        trained=trained * copies * 4 / shards,
        gradients=trained * 4 / shards,
        optimizer=trained * OPTIMIZER_BYTES[settings.optimizer_type] / shards,
        activations=activations,
        reserve=RESERVE,
        in_ram=in_ram,
    )


def transformer_shapes(
    config: TrainingConfig, checkpoint: Checkpoint
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that the mode loads."""
    mode = config.mode
    return {
        name: info.shape
        for key, info in checkpoint.tensors.items()
        if (name := key_maps.TRANSFORMER.rename(key)) is not None
        and not name.endswith(("weight_scale", "input_scale"))
        and (mode.video is not None or any(part in name for part in AUDIO_PARTS))
        and (mode.audio is not None or not any(part in name for part in SOUND_PARTS))
    }


def _weight_bytes(
    config: TrainingConfig, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]
) -> tuple[float, float, list[float]]:
    """All blocks', the rest's, and each block's."""
    element = base_dtype(config).itemsize
    quantized = QUANTIZED_BYTES.get(config.acceleration.quantization or "", element)
    fp8 = {
        key_maps.TRANSFORMER.rename(key)
        for key, info in checkpoint.tensors.items()
        if info.dtype == torch.float8_e4m3fn
    }
    layers: dict[int, float] = {}
    outside = 0.0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        if not name.startswith("transformer_blocks."):
            outside += size * element
            continue
        is_linear = len(shape) == 2 and name.endswith(".weight")
        each = 1 if name in fp8 else quantized if is_linear else element
        index = int(name.split(".")[1])
        layers[index] = layers.get(index, 0.0) + size * each
    return sum(layers.values()), outside, list(layers.values())


def _projector_bytes(config: TrainingConfig, checkpoint: Checkpoint) -> float:
    """The connectors. Hidden states that are large come projected, so the projection stays out."""
    is_small = (checkpoint.config.get("text_encoder") or {}).get("type") == "minilm"
    return sum(
        torch.Size(info.shape).numel() * base_dtype(config).itemsize
        for key, info in checkpoint.tensors.items()
        if (name := key_maps.TEXT_PROJECTOR.rename(key)) is not None
        and (is_small or not name.startswith("feature_extractor."))
    )


def _target_shapes(
    config: TrainingConfig, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[int, int]]:
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        layer = f".{name.removesuffix('.weight')}"
        if any(layer.endswith(f".{pattern}") for pattern in config.lora.target_modules):
            yield shape[0], shape[1]


def _activation_bytes(config: TrainingConfig, checkpoint: Checkpoint, tokens: Tokens) -> float:
    """What is kept from the forward pass, and the gradients of one block."""
    transformer = TransformerConfig.from_metadata(checkpoint.section("transformer"))
    batch = config.optimization.batch_size
    is_half = config.acceleration.mixed_precision_mode != "no"
    element = 2 if is_half else 4
    lora = config.lora if config.model.training_mode == "lora" else None
    block, outside = count_activations(lora, is_half, transformer, tokens)  # pyright: ignore[reportArgumentType]
    streams = tokens.video * transformer.width + tokens.audio * transformer.audio_width
    working = BACKWARD_TENSORS * streams * element
    layers = transformer.num_layers
    if config.optimization.enable_gradient_checkpointing:
        kept = layers * streams * element + block
    else:
        kept = layers * block
    return batch * (kept + outside + working)


@cache
def count_activations(
    lora: LoraSection | None, is_half: bool, transformer: TransformerConfig, tokens: Tokens
) -> tuple[float, float]:
    """Bytes that autograd keeps of one sample: for one block, and outside the blocks.

    `lora` None trains the weights themselves. Measured on a network of the same kind with one head
    and few tokens; both scale.
    """
    heads = transformer.num_attention_heads
    shorter = max(1, max(tokens) // 96)
    few = Tokens(*(-(-n // shorter) for n in tokens))
    if lora is not None:  # the rank shrinks with the width
        lora = lora.model_copy(update={"rank": max(1, lora.rank // heads)})
    narrow = replace(
        transformer,
        num_attention_heads=1,
        audio_num_attention_heads=1,
        cross_attention_dim=transformer.attention_head_dim,
        audio_cross_attention_dim=transformer.audio_attention_head_dim,
        in_channels=max(1, transformer.in_channels // heads),
        out_channels=max(1, transformer.out_channels // heads),
        audio_in_channels=max(1, transformer.audio_in_channels // heads),
        audio_out_channels=max(1, transformer.audio_out_channels // heads),
        caption_channels=transformer.caption_channels and transformer.attention_head_dim,
        has_video=tokens.video > 0,
        has_audio=tokens.audio > 0,
    )
    one, two = (kept_bytes(lora, is_half, replace(narrow, num_layers=n), few) for n in (1, 2))
    scale = heads * shorter
    return (two - one) * scale, (one - (two - one)) * scale


def kept_bytes(
    lora: LoraSection | None, is_half: bool, config: TransformerConfig, tokens: Tokens
) -> float:
    """What autograd keeps of one forward pass of a network of this configuration."""
    network = Transformer(config).to(torch.bfloat16 if is_half and lora else torch.float32)
    if lora is not None:
        layers = target_layers(network, lora.target_modules)
        attach(network, layers, rank=lora.rank, alpha=lora.alpha)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding them keeps their places from being reused

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    video = _modality(tokens.video, 3, config.in_channels, config, tokens.text, config.width)
    audio = _modality(
        tokens.audio, 1, config.audio_in_channels, config, tokens.text, config.audio_width
    )
    half = torch.autocast("cpu", torch.bfloat16, is_half and lora is None, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        network(video, audio)
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def _modality(
    count: int, axes: int, channels: int, config: TransformerConfig, text: int, width: int
) -> Modality | None:
    if not count:
        return None
    return Modality(
        torch.zeros(1, count, channels),
        torch.ones(1),
        torch.ones(1, count, 1),  # a noise level a token, as with conditions
        torch.zeros(1, axes, count, 2),
        torch.zeros(1, text, config.caption_channels or width),
    )


# What would make it fit.

Change = tuple[str, TrainingConfig]


def smallest_change(
    config: TrainingConfig, checkpoint: Checkpoint, tokens: Tokens, budget: float
) -> list[str]:
    """Settings in words: the least harmful one that suffices, else several; [] if none do."""
    total = make_plan(config, checkpoint, tokens).total
    changes = [
        (name, changed, make_plan(changed, checkpoint, tokens).total)
        for name, changed in _changes(config, checkpoint, total - budget)
    ]
    for name, _, less in changes:
        if less <= budget:
            return [name]
    for name, changed, less in changes:
        if less < total:
            rest = smallest_change(changed, checkpoint, tokens, budget)
            return [name, *rest] if rest else []
    return []


def _changes(config: TrainingConfig, checkpoint: Checkpoint, lacking: float) -> Iterator[Change]:
    """Single changes in the order in which a user would want them, for `lacking` bytes more."""
    settings, acceleration = config.optimization, config.acceleration
    is_lora = config.model.training_mode == "lora"
    is_sharded = acceleration.distributed == "fsdp" and acceleration.num_processes > 1
    if not settings.enable_gradient_checkpointing:
        yield _changed(config, "optimization", enable_gradient_checkpointing=True)
    if settings.batch_size > 1:
        samples = settings.batch_size * settings.gradient_accumulation_steps
        yield _changed(config, "optimization", batch_size=1, gradient_accumulation_steps=samples)
    if settings.optimizer_type in ("adamw", "schedule_free") and not is_sharded and not is_lora:
        yield _changed(config, "optimization", optimizer_type="adamw8bit")
    if is_lora and acceleration.quantization is None and not is_sharded:
        yield _changed(config, "acceleration", quantization="int8")
    is_swappable = is_lora and not is_sharded and acceleration.quantization != "nf4"
    if is_swappable and settings.enable_gradient_checkpointing:
        _, _, per_layer = _weight_bytes(config, checkpoint, transformer_shapes(config, checkpoint))
        before = acceleration.blocks_to_swap
        # The first block that is swapped frees nothing: one block's place is for visits.
        count = before + math.ceil(lacking / max(per_layer)) + (before == 0)
        if before < len(per_layer):
            count = min(count, len(per_layer))
            yield _changed(config, "acceleration", blocks_to_swap=count, compile=False)
    if acceleration.quantization == "int8" and not acceleration.blocks_to_swap:
        yield _changed(config, "acceleration", quantization="nf4")
    if is_lora and config.lora.rank > 16:
        yield _changed(config, "lora", rank=16, alpha=16.0 * config.lora.alpha / config.lora.rank)
    if not is_lora:
        for count in (n for n in CARDS if n > acceleration.num_processes):
            yield _changed(config, "acceleration", distributed="fsdp", num_processes=count)


def _changed(config: TrainingConfig, section: str, **values: Any) -> Change:
    old = getattr(config, section)
    values = {key: value for key, value in values.items() if getattr(old, key) != value}
    new = config.model_copy(update={section: old.model_copy(update=values)})
    words = (f"{section}.{key} {_plain(value)}" for key, value in values.items())
    return " and ".join(words), new


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
