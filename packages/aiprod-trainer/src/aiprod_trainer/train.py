"""The training loop of `aiprod train`: LoRA, IC-LoRA and full fine-tuning of a transformer.

They differ in what is trainable and in the conditions of the mode; the loop is the same. A sample's
randomness is a function of (seed, step, its number in the step): a run that is killed and resumed
goes on as if it had not been, and two processes do what one does with twice the batch.

One process, or several started by torchrun (`acceleration.distributed` says how they share):

    aiprod train configs/nano/lora.yaml
    torchrun --nproc-per-node 2 -m aiprod_trainer.cli configs/nano/lora.yaml
"""

import contextlib
import importlib.util
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from aiprod_core.errors import InputError
from aiprod_core.kernels.apply import compile_blocks
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint
from aiprod_core.loader.networks import load_text_encoder, load_text_projector, load_transformer
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.text_connector import TextProjector
from aiprod_core.model.transformer import Transformer
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_core.types import ScaleFactors
from aiprod_pipelines.cache import keep_compiled_code
from aiprod_pipelines.model_files import resolve_model
from aiprod_trainer import adapters, checkpoints, fitting
from aiprod_trainer.data import Batch, LatentDataset
from aiprod_trainer.modes import (
    Conditioned,
    condition_batch,
    needed_tensors,
    reference_factors,
)
from aiprod_trainer.named_optimizers import build_optimizers, learning_rate_factor
from aiprod_trainer.objective import (
    Noised,
    draw_sigmas,
    flow_dpo_losses,
    noise_state,
    sample_losses,
    shift_for,
)
from aiprod_trainer.optimizers import set_learning_rate
from aiprod_trainer.publishing import publish_weights, push_to_hub
from aiprod_trainer.reporting import Report
from aiprod_trainer.training_config import TrainingConfig
from aiprod_trainer.validation import Validation

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_LENGTHS = {"minilm": 64, "gemma3": 1024}  # tokens, where the file does not say


@dataclass(frozen=True)
class Sizes:
    """What the codecs' configurations say about latents and their times."""

    scale: ScaleFactors
    sample_rate: int
    hop_length: int


def train(config: TrainingConfig, *, resume: bool = True) -> Path:
    """Runs a training to its end, or to a signal, and returns its last checkpoint.

    Raises InputError for a configuration that cannot work, and for a loss that is not finite.
    """
    accelerator = start_accelerator(config)
    try:
        return _train(config, accelerator, resume=resume)
    finally:
        accelerator.end_training()
        if accelerator.num_processes == 1:
            accelerator.state._reset_state(reset_partial_state=True)  # for the next run


def _train(config: TrainingConfig, accelerator: Accelerator, *, resume: bool) -> Path:
    settings, folder = config.optimization, config.output_dir
    device, is_main = accelerator.device, accelerator.is_main_process
    if device.type == "cpu":
        device = torch.device("cpu")  # accelerate counts CPUs, which loaders do not know
    last = checkpoints.latest(folder)
    if last is not None and not resume:
        raise InputError(
            f"{folder}: has checkpoints up to {last.name}; resume it, or give another output_dir."
        )
    # What the run reads: the base model's header, the data set, and only then the weights.
    checkpoint = open_model(config)
    sizes = read_sizes(checkpoint)
    data = open_data(config, checkpoint)
    validation = Validation.prepare(config, device, factors(config, data))
    projector = load_text_projector(checkpoint, dtype=base_dtype(config))
    if not data.has_hidden_states:
        del projector.feature_extractor  # the larger part of it
    projector.to(device)
    transformer = build_transformer(config, checkpoint, device)
    model = share(transformer, config, accelerator)
    precision = accelerator.autocast if needs_autocast(config) else contextlib.nullcontext
    parameters = checkpoints.trained_parameters(transformer)
    optimizers = build_optimizers(
        settings.optimizer_type, transformer, settings.learning_rate, settings.optimizer_params
    )
    if accelerator.scaler is not None:
        optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    average = None
    if settings.ema_decay is not None:
        average = {name: p.detach().clone() for name, p in parameters.items()}
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    step = 0
    if last is not None:
        step = checkpoints.load_state(last / "state.safetensors", parameters, average, inner)
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(as_yaml(config))

    def save(step: int) -> Path:
        """Gathers on every process, writes on the first."""
        with ready_for_use(inner):
            kept = checkpoints.gather(parameters if average is None else average, is_main)
            state, facts = checkpoints.gather_state(parameters, average, inner, is_main)
            if config.checkpoints.save_training_state == "minimal":
                state = {k: v for k, v in state.items() if not k.startswith("optimizer/")}

            def write(target: Path) -> None:
                publish_weights(target, config, checkpoint, kept, factors(config, data))
                if config.checkpoints.save_training_state != "off":
                    checkpoints.save_state(target / "state.safetensors", state, step, facts)
                (target / "config.yaml").write_text(as_yaml(config))

            if is_main:
                keep = config.checkpoints.keep_last_n
                return checkpoints.write_checkpoint(folder, step, write, keep)
        return checkpoints.folder_of(folder, step)

    def validate(step: int) -> None:
        if validation is None:
            return
        is_offloaded = config.acceleration.offload_optimizer_during_validation
        with (
            swapped_in(parameters, average),
            optimizers_on("cpu" if is_offloaded else None, inner),
            ready_for_use(inner),
        ):
            report.clips(step, validation.run(transformer, folder / "validation", step, is_main))

    draw = partial(draw_step, config, data, accelerator.process_index, accelerator.num_processes)
    set_training(inner, True)
    transformer.train()
    with (
        Report(accelerator, config, step) as report,
        StopSignal() as stop,
        Prefetch(draw, step, settings.steps, config.data.num_dataloader_workers) as batches,
    ):
        if step == 0 and not config.validation.skip_initial_validation:
            validate(0)
        while step < settings.steps and not stop.is_asked(accelerator):
            factor = learning_rate_factor(
                settings.scheduler_type, step, settings.steps, settings.warmup_steps,
                settings.scheduler_params,
            )  # fmt: skip
            set_learning_rate(inner, factor)
            torch.manual_seed(seed_of(config, step, accelerator.process_index))  # of dropout
            for number, (batch, rows) in enumerate(micro_batches := batches(step)):
                is_last = number == len(micro_batches) - 1
                syncs = contextlib.nullcontext() if is_last else accelerator.no_sync(model)
                with syncs:
                    example = partial(make_examples, config, rows=rows, step=step)
                    example = partial(example, projector=projector, sizes=sizes, device=device)
                    examples = example(batch)
                    with precision():
                        if config.is_preference:
                            worse = example(rejected(batch))
                            losses = preference_losses(config, model, transformer, examples, worse)
                            examples = dict.fromkeys(losses, examples["video"])
                        else:
                            losses = losses_of(model, examples)
                    loss = torch.stack([values.mean() for values in losses.values()]).sum()
                    accelerator.backward(loss / len(micro_batches))
                report.losses(examples, losses)
            norm = clip_gradients(accelerator, list(parameters.values()), settings.max_grad_norm)
            report.check_finite(step, norm, last, has_scaler=accelerator.scaler is not None)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if average is not None:
                update_average(average, parameters, step, settings.ema_decay or 0.0)
            step += 1
            report.step(step, norm, inner)
            is_saved = is_due(step, config.checkpoints.interval) and step < settings.steps
            if is_saved:
                last = save(step)
            if is_due(step, config.validation.interval):
                validate(step)
        if last is None or last != checkpoints.folder_of(folder, step):
            last = save(step)
        report.done(step, last, is_stopped=step < settings.steps)
    if config.hub.push_to_hub and is_main and step == settings.steps:
        push_to_hub(config, last, checkpoint)
    return last


# Setting up.


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """One process, or its place among several. Full fine-tuning keeps float32 weights and computes
    in 16 bits by autocast; a frozen base is stored in 16 bits itself."""
    acceleration = config.acceleration
    precision = acceleration.mixed_precision_mode
    is_lora = config.model.training_mode == "lora"
    is_on_cuda = torch.cuda.is_available() and acceleration.device in (None, "cuda")
    if acceleration.device == "cuda" and not torch.cuda.is_available():
        raise InputError("acceleration.device cuda: PyTorch finds no CUDA GPU here; try cpu.")
    if precision == "fp16" and not is_on_cuda:
        raise InputError("acceleration.mixed_precision_mode fp16 needs CUDA; use bf16 or no.")
    return Accelerator(
        mixed_precision="no" if is_lora and precision == "bf16" else precision,
        cpu=acceleration.device == "cpu",
        kwargs_handlers=[
            # Streams take turns: in the last block some of a given stream's weights do nothing.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # A cache would hold 16-bit copies of all weights until the end of the pass.
            AutocastKwargs(cache_enabled=False),
        ],
        project_dir=str(config.output_dir),
        log_with=trackers(config) or None,
    )


def trackers(config: TrainingConfig) -> list[Any]:
    """Raises InputError for one that is not installed; accelerate would leave it out in silence."""
    sections = {"tensorboard": config.tensorboard, "wandb": config.wandb, "trackio": config.trackio}
    names = [name for name, section in sections.items() if section.enabled]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name}.enabled needs a package: pip install {name}")
    return names


def base_dtype(config: TrainingConfig) -> torch.dtype:
    """What the base is stored in: full fine-tuning keeps what it adds up in float32."""
    if config.model.training_mode == "full":
        return torch.float32
    return DTYPES[config.acceleration.mixed_precision_mode]


def needs_autocast(config: TrainingConfig) -> bool:
    is_full = config.model.training_mode == "full"
    return is_full and config.acceleration.mixed_precision_mode != "no"


def open_model(config: TrainingConfig) -> Checkpoint:
    """The base model's headers."""
    model = config.model
    parts = [path for path in (model.video_vae_path, model.audio_vae_path) if path is not None]
    return open_checkpoint(*resolve_model(model.model_path, model.text_encoder_path), *parts)


def read_sizes(checkpoint: Checkpoint) -> Sizes:
    scale = VideoVAEConfig.from_metadata(checkpoint.section("vae")).scale
    if "audio_vae" not in checkpoint.config:
        return Sizes(scale, 16000, 160)
    audio = AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
    return Sizes(scale, audio.sampling_rate, audio.hop_length)


def open_data(config: TrainingConfig, checkpoint: Checkpoint) -> LatentDataset:
    """The data set, with all that the mode asks of it. Raises InputError for what is missing."""
    section = checkpoint.config.get("text_encoder") or {"type": "gemma3"}
    length = int(section.get("max_length") or TEXT_LENGTHS[section["type"]])
    data = LatentDataset(config.data.preprocessed_data_root, length)
    needed = needed_tensors(config.mode)
    if config.is_preference:
        needed += ["rejected_video", "rejected_audio"]
    for bucket in data.buckets:
        missing = [name for name in needed if name not in bucket.shapes]
        if missing:
            hint = "; or set training_strategy.with_audio false" if missing == ["audio"] else ""
            raise InputError(
                f"{data.folder}: {len(bucket.clips)} clips have no {' and no '.join(missing)}, "
                f"which {config.training_strategy.name} needs; they have "
                f"{', '.join(bucket.shapes)}. Prepare them with it{hint}."
            )
        reference_factors(config.mode, bucket)
        if bucket.fps is None and config.data.frame_rate is None:
            raise InputError(
                f"{data.folder}: its parts do not say their frame rate; set data.frame_rate."
            )
    if config.data.caption_dropout and data.empty is None:
        # Small encoders are asked here; features of large ones come with their empty caption.
        hidden, mask = load_text_encoder(checkpoint, config.model.text_encoder_path).encode([""])
        data.empty = {"hidden": hidden[0][mask[0].bool()]}
    return data


def factors(config: TrainingConfig, data: LatentDataset) -> tuple[int, int]:
    return reference_factors(config.mode, data.buckets[0])


def build_transformer(
    config: TrainingConfig, checkpoint: Checkpoint, device: torch.device
) -> Transformer:
    """The base with what is trained on it, fitted to the device."""
    acceleration, mode = config.acceleration, config.mode
    start = config.model.load_checkpoint
    is_lora = config.model.training_mode == "lora"
    if start is not None and not is_lora:
        checkpoint = open_checkpoint(checkpoints.published_file(start))
    is_in_parts = bool(acceleration.quantization or acceleration.blocks_to_swap)
    transformer = load_transformer(
        checkpoint,
        dtype=base_dtype(config),
        device="cpu" if is_in_parts else device,
        audio_only=mode.video is None,
        video_only=mode.audio is None,
    )
    if acceleration.quantization is not None:
        fitting.quantize_base(transformer, acceleration.quantization, device)
    if is_lora:
        lora = config.lora
        adapters.attach(
            transformer,
            adapters.target_layers(transformer, lora.target_modules),
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            generator=torch.Generator().manual_seed(config.seed),
        )
        if start is not None:
            adapters.load_lora(transformer, checkpoints.published_file(start))
    else:
        # Memory-mapped tensors are the file's own: training writes to copies.
        for parameter in transformer.parameters():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
    blocks = list(transformer.transformer_blocks)
    swapped = min(acceleration.blocks_to_swap, len(blocks))
    if is_in_parts:
        fitting.keep_in_ram(blocks[:swapped], device)
        for module in (*blocks[swapped:], *transformer.children()):
            if module is not transformer.transformer_blocks:
                module.to(device)
        for table in transformer.parameters(recurse=False):
            table.data = table.data.to(device)
    if config.optimization.enable_gradient_checkpointing:
        fitting.recompute_activations(blocks)
    if acceleration.compile:
        keep_compiled_code(transformer.config)
        compile_blocks(transformer)
    return transformer


def share(transformer: Transformer, config: TrainingConfig, accelerator: Accelerator) -> nn.Module:
    """The network among several processes: whole in each (DDP), or spread over them (FSDP2).

    Spread in place and by hand, since accelerate's FSDP leaves out the CPU.
    """
    if accelerator.num_processes == 1:
        return transformer
    if config.acceleration.distributed == "ddp":
        return accelerator.prepare(transformer)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Weights travel in 16 bits where they compute so. Inputs stay: rotary tables are float32.
    dtype = DTYPES[config.acceleration.mixed_precision_mode] if needs_autocast(config) else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
    return transformer


# One step.


def draw_step(
    config: TrainingConfig, data: LatentDataset, rank: int, world_size: int, step: int
) -> list[tuple[Batch, list[int]]]:
    """This process's batches of a step, with their samples' numbers in it."""
    size = config.optimization.batch_size
    bucket = data.draw_bucket(np.random.default_rng([config.seed, step, 0]))
    batches = []
    for micro in range(config.optimization.gradient_accumulation_steps):
        first = (micro * world_size + rank) * size
        rows = list(range(first, first + size))
        rngs = [np.random.default_rng([config.seed, step, 1 + row]) for row in rows]
        batches.append((data.draw(bucket, rngs, config.data.caption_dropout), rows))
    return batches


def make_examples(
    config: TrainingConfig,
    batch: Batch,
    rows: Sequence[int],
    step: int,
    projector: TextProjector,
    sizes: Sizes,
    device: torch.device,
) -> dict[str, Noised]:
    """Each stream's noisy tokens and what the network should answer."""
    streams = condition_batch(
        config.mode,
        batch,
        np.random.default_rng([config.seed, step, 0, 1]),
        scale=sizes.scale,
        fps=batch.fps or config.data.frame_rate or 0.0,
        sample_rate=sizes.sample_rate,
        hop_length=sizes.hop_length,
        device=device,
    )
    generators = [torch.Generator().manual_seed(seed_of(config, step, 1 + row, 2)) for row in rows]
    sigmas = draw_levels(config, streams, generators)
    with torch.no_grad():
        contexts = encode_text(projector, batch, device)
    return {
        name: noise_state(
            stream.state,
            sigmas[name],
            contexts[name],
            generators,
            num_tokens=stream.grid.num_tokens,
            is_uniform=stream.is_uniform,
        )
        for name, stream in streams.items()
    }


def draw_levels(
    config: TrainingConfig, streams: dict[str, Conditioned], generators: list[torch.Generator]
) -> dict[str, Tensor]:
    """Noise levels (B,) of each stream; 0 for one that is given."""
    flow = config.flow_matching
    shift = None
    if flow.timestep_sampling_mode == "shifted_logit_normal":
        longest = streams.get("video") or streams["audio"]
        shift = shift_for(longest.grid.num_tokens) if flow.shift is None else flow.shift
    is_pair = len(streams) == 2 and not any(stream.is_given for stream in streams.values())
    video, audio = draw_sigmas(
        generators,
        shift=shift,
        uniform_share=flow.uniform_share,
        joint_share=flow.joint_share if is_pair else 1.0,
        clean_share=flow.clean_share if is_pair else 0.0,
    )
    levels = {"video": video, "audio": audio}
    return {n: levels[n] * 0 if s.is_given else levels[n] for n, s in streams.items()}


def encode_text(projector: TextProjector, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Contexts (B, S, D) of both streams, from hidden states or from features."""
    mask = batch.mask.to(device)
    if "hidden" in batch.text:
        video, audio, _ = projector(batch.text["hidden"].to(device), mask)
    else:
        dtype = next(projector.parameters()).dtype
        features = [batch.text.get(name) for name in ("video_features", "audio_features")]
        present = [f.to(device, dtype) for f in features if f is not None]
        video, audio, _ = projector.connect(present[0], present[-1], mask)
    return {"video": video, "audio": audio}


def losses_of(model: nn.Module, examples: dict[str, Noised]) -> dict[str, Tensor]:
    """(B,) losses of each stream that is generated."""
    video, audio = examples.get("video"), examples.get("audio")
    velocities = model(
        None if video is None else video.modality, None if audio is None else audio.modality
    )
    return {
        name: sample_losses(velocity, example)
        for name, velocity, example in zip(
            ("video", "audio"), velocities, (video, audio), strict=True
        )
        if example is not None and velocity is not None
    }


def rejected(batch: Batch) -> Batch:
    """The clips that are worse than the batch's, with the same captions."""
    extras = batch.extras
    return replace(batch, video=extras["rejected_video"], audio=extras["rejected_audio"])


def preference_losses(
    config: TrainingConfig,
    model: nn.Module,
    transformer: Transformer,  # what `model` runs, alone or among processes
    better: dict[str, Noised],
    worse: dict[str, Noised],
) -> dict[str, Tensor]:
    """(B,) Flow-DPO losses; the reference is the base, without the LoRA that is trained."""
    with torch.no_grad(), adapters.switched_off(transformer):
        before = losses_of(model, better), losses_of(model, worse)
    now = losses_of(model, better), losses_of(model, worse)
    return {"preference": flow_dpo_losses(*now, *before, config.training_strategy.beta)}


def clip_gradients(
    accelerator: Accelerator, parameters: list[nn.Parameter], max_norm: float
) -> float:
    """Scales all gradients down together where their norm is above `max_norm`; returns it."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    assert norm is not None
    return float(checkpoints.whole(norm))


@torch.no_grad()
def update_average(
    average: dict[str, Tensor], parameters: dict[str, nn.Parameter], step: int, decay: float
) -> None:
    """EMA whose window grows with the run: the decay is at most (1 + step) / (10 + step)."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    current = [parameter.detach() for parameter in parameters.values()]
    torch._foreach_lerp_(list(average.values()), current, weight)  # pyright: ignore[reportPrivateImportUsage]


# Around the steps.


def seed_of(config: TrainingConfig, *numbers: int) -> int:
    """A 63-bit seed that is a function of the configuration's and these numbers."""
    words = np.random.SeedSequence([config.seed, *numbers]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def as_yaml(config: TrainingConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def set_training(optimizers: Sequence[Optimizer], is_training: bool) -> None:
    """Schedule-free optimisers keep other weights for steps than for use."""
    for optimizer in optimizers:
        switch = getattr(optimizer, "train" if is_training else "eval", None)
        if switch is not None:
            switch()


@contextlib.contextmanager
def ready_for_use(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """The weights as they are to be used, in the place of those that the next step changes."""
    set_training(optimizers, False)
    try:
        yield
    finally:
        set_training(optimizers, True)


@contextlib.contextmanager
def swapped_in(
    parameters: dict[str, nn.Parameter], average: dict[str, Tensor] | None
) -> Iterator[None]:
    """The averaged weights in the place of the trained ones."""
    if average is None:
        yield
        return
    trained = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = average[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = trained[name]


@contextlib.contextmanager
def optimizers_on(device: str | None, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """The optimisers' state on another device for a while; None leaves it."""
    if device is None:
        yield
        return
    tensors = [
        value
        for optimizer in optimizers
        for slots in optimizer.state.values()
        for value in slots.values()
        if isinstance(value, Tensor)
    ]
    homes = [tensor.device for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = tensor.data.to(home)


class StopSignal:
    """Remembers SIGTERM and Ctrl-C, so that the step under way ends with a checkpoint."""

    def __enter__(self) -> "StopSignal":
        self._is_asked = False
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_asked(self, accelerator: Accelerator) -> bool:
        """Whether any of the processes was told to stop."""
        if accelerator.num_processes == 1:
            return self._is_asked
        if self._is_asked:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    def _ask(self, *_: Any) -> None:
        self._is_asked = True


class Prefetch:
    """The batches of a step, read while the step before computes where there is a worker."""

    def __init__(self, draw: Any, first: int, stop: int, workers: int):
        self._draw, self._stop = draw, stop
        self._pool = ThreadPoolExecutor(1) if workers else None
        self._next: Future | None = None

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> list[tuple[Batch, list[int]]]:
        if self._pool is None:
            return self._draw(step)
        ready = self._next.result() if self._next is not None else self._draw(step)
        if step + 1 < self._stop:
            self._next = self._pool.submit(self._draw, step + 1)
        return ready
