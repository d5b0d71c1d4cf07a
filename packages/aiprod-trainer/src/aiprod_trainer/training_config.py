"""The configuration of `aiprod train`: LTX-2's YAML roots and keys, and what it has no name for.

Keys that LTX-2's trainer lacks are marked "ours". Unknown keys are errors that name the nearest.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from aiprod_core.errors import InputError
from aiprod_trainer.config import Section, read_config
from aiprod_trainer.modes import MODES, Condition, Mode, Stream, check_mode
from aiprod_trainer.named_optimizers import check_names


class ModelSection(Section):
    model_path: str  # nano, a .safetensors file, a folder, or a hub repository
    text_encoder_path: Path | None = None  # for validation prompts; default: beside the model
    video_vae_path: Path | None = None  # where the codecs are files of their own
    audio_vae_path: Path | None = None
    training_mode: Literal["lora", "full"] = "lora"
    load_checkpoint: Path | None = None  # weights to start from; a folder means its latest


class LoraSection(Section):
    rank: int = Field(default=64, ge=1)
    alpha: float = 64.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    # A name or the end of one: to_k is in video, audio and cross layers, attn1.to_k in video's.
    target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")


class StrategySection(Section):
    """A row of MODES by its name, or `flexible` with both streams spelled out."""

    name: str = "text-to-video"
    video: Stream | None = None
    audio: Stream | None = None
    # Of text_to_video and video_to_video.
    first_frame_conditioning_p: float = Field(default=0.1, ge=0.0, le=1.0)
    with_audio: bool = True
    reference_latents_dir: str | None = None  # video_to_video
    beta: float = Field(default=500.0, gt=0.0)  # ours, of preference: how closely to keep the base


class OptimizationSection(Section):
    learning_rate: float = Field(default=5e-4, gt=0.0)
    steps: int = Field(default=3000, ge=1)
    batch_size: int = Field(default=2, ge=1)  # of one process and one accumulation step
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    optimizer_type: str = "adamw"
    optimizer_params: dict[str, Any] = Field(default_factory=dict)  # ours: its own, such as betas
    scheduler_type: str = "linear"
    scheduler_params: dict[str, Any] = Field(default_factory=dict)
    warmup_steps: int = Field(default=0, ge=0)  # ours
    enable_gradient_checkpointing: bool = True
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)  # ours: averages are published


class AccelerationSection(Section):
    device: Literal["cpu", "cuda", "mps"] | None = None  # ours; default: the best there is
    mixed_precision_mode: Literal["no", "fp16", "bf16"] = "bf16"
    quantization: Literal["int8", "nf4"] | None = None  # of a frozen base
    blocks_to_swap: int = Field(default=0, ge=0)  # ours: blocks of a frozen base that stay in RAM
    compile: bool = False  # ours: each block, once for all shapes of a bucket
    distributed: Literal["ddp", "fsdp"] = "ddp"  # ours: of several processes (torchrun)
    offload_optimizer_during_validation: bool = False
    memory_gb: float | None = None  # ours: the card that must suffice; default: the one there is
    num_processes: int = Field(default=1, ge=1)  # ours: for --plan; a run counts its own


class DataSection(Section):
    preprocessed_data_root: Path
    num_dataloader_workers: int = Field(default=1, ge=0)  # 0 reads a batch when it is needed
    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0)  # ours
    frame_rate: float | None = None  # ours: of parts that do not say


class ValidationSample(Section):
    prompt: str
    image: Path | None = None  # the first frame
    reference: Path | None = None  # a video to follow; with `control` made into a signal first
    control: Literal["canny", "depth", "pose", "reference"] = "reference"
    audio: Path | None = None  # a sound to follow
    video_dims: tuple[int, int, int] | None = None  # width, height, frames
    seed: int | None = None


class ValidationSection(Section):
    samples: tuple[ValidationSample, ...] = ()
    prompts: tuple[str, ...] = ()  # short for samples of nothing but a prompt
    negative_prompt: str | None = None
    video_dims: tuple[int, int, int] | None = None  # default: the model's own
    frame_rate: float | None = None
    seed: int = 42
    inference_steps: int | None = None
    interval: int | None = Field(default=100, ge=1)  # steps; null never
    video_cfg_scale: float | None = None
    audio_cfg_scale: float | None = None
    video_stg_scale: float | None = None
    audio_stg_scale: float | None = None
    stg_blocks: tuple[int, ...] | None = None
    guidance_rescale: float | None = None
    modality_scale: float | None = None
    generate_audio: bool = True
    generate_video: bool = True
    skip_initial_validation: bool = False


class CheckpointsSection(Section):
    interval: int | None = Field(default=250, ge=1)  # steps; null only at the end
    keep_last_n: int = Field(default=3, ge=-1)  # -1 keeps all
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of published weights
    no_resume: bool = False
    save_training_state: Literal["full", "minimal", "off"] = "full"


class FlowMatchingSection(Section):
    timestep_sampling_mode: Literal["shifted_logit_normal", "uniform"] = "shifted_logit_normal"
    shift: float | None = None  # ours: mean of the logit; default grows with the sequence
    uniform_share: float = Field(default=0.1, ge=0.0, le=1.0)  # ours: drawn uniformly all the same
    joint_share: float = Field(default=1.0, ge=0.0, le=1.0)  # ours: picture and sound share a level
    clean_share: float = Field(default=0.0, ge=0.0, le=1.0)  # ours: one of the two is clean


class HubSection(Section):
    push_to_hub: bool = False
    hub_model_id: str | None = None


class WandbSection(Section):
    enabled: bool = False
    project: str = "aiprod"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    log_validation_videos: bool = True


class TrackioSection(Section):
    enabled: bool = False
    project: str = "aiprod"


class TensorboardSection(Section):
    enabled: bool = True


class TrainingConfig(Section):
    """Everything that decides a training run."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    training_strategy: StrategySection = StrategySection()
    optimization: OptimizationSection = OptimizationSection()
    acceleration: AccelerationSection = AccelerationSection()
    data: DataSection
    validation: ValidationSection = ValidationSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    flow_matching: FlowMatchingSection = FlowMatchingSection()
    hub: HubSection = HubSection()
    wandb: WandbSection = WandbSection()
    trackio: TrackioSection = TrackioSection()
    tensorboard: TensorboardSection = TensorboardSection()
    seed: int = Field(default=42, ge=0)
    output_dir: Path = Path("outputs/train")
    log_interval: int = Field(default=10, ge=1)  # ours: steps

    @property
    def is_preference(self) -> bool:
        return self.training_strategy.name == "preference"

    @property
    def mode(self) -> Mode:
        """The streams of the strategy. Raises InputError for a name that no mode has."""
        return mode_of(self.training_strategy)


def read_training_config(path: Path, overrides: list[str] | None = None) -> TrainingConfig:
    """Reads and checks a configuration, across its sections too. Raises InputError."""
    config = read_config(path, TrainingConfig, overrides)
    check_mode(config.mode)
    check_names(config.optimization.optimizer_type, config.optimization.scheduler_type)
    is_lora, acceleration = config.model.training_mode == "lora", config.acceleration
    for key in ("quantization", "blocks_to_swap"):
        if getattr(acceleration, key) and not is_lora:
            raise InputError(
                f"acceleration.{key} is for weights that stay as they are; full fine-tuning "
                "changes them: set model.training_mode lora, or spread them with distributed fsdp."
            )
    if config.is_preference and not is_lora:
        raise InputError(
            "training_strategy.name preference compares the model with what it was before: set "
            "model.training_mode lora, whose base stays as it was."
        )
    if acceleration.blocks_to_swap and not config.optimization.enable_gradient_checkpointing:
        raise InputError(
            "acceleration.blocks_to_swap needs optimization.enable_gradient_checkpointing: without "
            "it every block's weights stay on the card until the backward pass."
        )
    if acceleration.blocks_to_swap and acceleration.quantization == "nf4":
        raise InputError(
            "acceleration.blocks_to_swap does not move NF4 weights; use quantization int8 with it."
        )
    if acceleration.blocks_to_swap and acceleration.compile:
        raise InputError("acceleration.blocks_to_swap and compile exclude each other; drop one.")
    if config.optimization.ema_decay and config.optimization.optimizer_type == "schedule_free":
        raise InputError(
            "optimization.ema_decay: schedule_free averages its weights itself; leave it out."
        )
    if acceleration.distributed == "fsdp" and config.optimization.optimizer_type == "muon":
        raise InputError(
            "optimization.optimizer_type muon needs whole matrices, which fsdp spreads over the "
            "processes; use adamw, or distributed ddp."
        )
    return config


def mode_of(strategy: StrategySection) -> Mode:
    """The mode of a strategy; LTX-2's older names are rows with a first frame now and then."""
    name = strategy.name.replace("_", "-")
    if name == "flexible":
        return Mode(strategy.video, strategy.audio)
    if name not in MODES:
        import difflib

        nearest = difflib.get_close_matches(name, MODES, 1, cutoff=0.4)
        hint = f", did you mean {nearest[0]}?" if nearest else "."
        raise InputError(
            f"training_strategy.name must be flexible or one of {', '.join(MODES)}; got "
            f"{strategy.name}{hint}"
        )
    if strategy.video is not None or strategy.audio is not None:
        raise InputError(
            f"training_strategy: {strategy.name} says itself what happens to video and audio; "
            "spell them out with name: flexible."
        )
    mode = MODES[name]
    video, audio = mode.video, mode.audio if strategy.with_audio else None
    if name in ("text-to-video", "video-to-video") and video is not None:
        probability = strategy.first_frame_conditioning_p
        first = Condition(type="first_frame", probability=probability)
        conditions = [first] if probability else []
        for condition in video.conditions:
            update = {"latents_dir": strategy.reference_latents_dir}
            conditions.append(condition.model_copy(update=update))
        video = video.model_copy(update={"conditions": tuple(conditions)})
    return Mode(video, audio)
