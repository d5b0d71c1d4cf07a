"""Distils a guided many-step model into a student of few steps without guidance.

    aiprod distill configs/nano/distill.yaml

Both modalities are learnt together, in latent space, from prompts alone; `latents` gives captions
and shapes, and first frames for the share of clips that start from one. Two stages:

1. Trajectory. The student runs through its own fixed levels; from every state that it visits the
   teacher goes on, guided and in small steps, to the student's next level, and the student's one
   step regresses onto where the teacher came out. So it learns what to do where it really is
   (DAgger, arXiv:1011.0686) along the teacher's trajectory (progressive distillation,
   arXiv:2202.00512), and a seed keeps its clip.
2. Distribution matching (DMD2, arXiv:2405.14867). A third network, the fake score, follows the
   student's finished clips by flow matching; where it and the guided teacher disagree about a
   noised clip of the student's, the clip is pushed the teacher's way. What regression left soft is
   sharpened.

With `mode: full` there are three whole networks and the linear weights are trained: all that a
LoRA can carry, so the difference can be published as one, of any rank. With `mode: lora` the three
share the base's weights, and student and fake score each add low-rank changes of their own.

Letters: B batch, N tokens, C channels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from aiprod_core.components import conditioning, schedulers
from aiprod_core.components.guiders import Guidance, GuidedDenoiser, GuidedModality, Model
from aiprod_core.components.noisers import noisy_start
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.components.samplers import Blend, Denoise, euler, euler_step
from aiprod_core.errors import InputError
from aiprod_core.kernels.apply import compile_blocks
from aiprod_core.loader.networks import load_text_projector, load_transformer
from aiprod_core.model.text_connector import TextProjector
from aiprod_core.types import AV, AudioLatentShape, LatentState, Modality, VideoLatentShape
from aiprod_pipelines import encoding, stages
from aiprod_pipelines.cache import keep_compiled_code
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_trainer.config import Section
from aiprod_trainer.data import Batch, LatentDataset
from aiprod_trainer.low_rank import Changes, publish, share_weights
from aiprod_trainer.objective import Noised, sample_sigmas, velocity_loss
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.run import Run, averaged_copy, update_average
from aiprod_trainer.train import encode_text

# Steps shorter than this are learnt less often, in proportion, and longer ones count more, so that
# all count by their length: near pure noise they are many, wild (guided velocities are three times
# as long there) and hardly move anything.
FULL_SHARE_FROM = 0.05
HELD_OUT = 8  # clips


class DistillConfig(Section):
    model: str = "nano"  # the teacher, as for `aiprod generate`
    text_encoder_path: str | None = None
    latents: Path  # prepared clips: their captions are the prompts
    output_dir: Path
    mode: Literal["full", "lora"] = "full"
    rank: int = Field(64, ge=1)  # of the published LoRA, and of what `lora` trains
    guidance: dict[str, Any] = Field(
        {}
    )  # the teacher's, as fields of a request; default: the model's
    max_teacher_step: float = Field(0.1, gt=0)  # in sigma
    four_step_share: float = Field(0.2, ge=0, le=1)  # of the batches; the others run in 8 steps
    first_frame_p: float = Field(0.1, ge=0, le=1)  # share of batches that start from a given frame
    trajectory_steps: int = Field(250, ge=0)
    matching_steps: int = Field(50, ge=0)
    fake_updates: int = Field(3, ge=1)  # of the fake score for each of the student's
    fake_warmup: int = Field(10, ge=0)  # matching steps in which the fake score learns alone
    matching_depth: int = Field(1, ge=1)  # of the student's last steps, how many matching changes
    batch_size: int = Field(16, ge=1)
    muon_lr: float = 3e-4  # of whole matrices
    adamw_lr: float = 1e-4  # of the rest, and of LoRAs
    matching_lr: float = 0.1  # share of the rates that matching starts from
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    audio_weight: float = 1.0
    ema_decay: float = 0.98
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks' products
    compile: bool = False  # the blocks, for whole networks
    device: str | None = None
    seed: int = 0
    eval_every: int = 25
    save_every_s: float = 180.0

    @property
    def total_steps(self) -> int:
        return self.trajectory_steps + self.matching_steps


@dataclass(frozen=True)
class Networks:
    """Who computes, and what is trained of it. In `lora` mode all four are one network."""

    teacher: Model
    student: Model
    fake: Model
    average: Model  # the student's, which is published
    weights: dict[str, nn.Module]  # "student", "fake", "average"
    changes: Callable[[], Changes]  # the average's, by layer


@dataclass(frozen=True)
class Task:
    """A batch of clips to make: what the pipelines know of one, without noise yet."""

    video: LatentState
    audio: LatentState | None
    contexts: dict[str, Tensor]  # (B, S, D)
    negatives: dict[str, Tensor]
    guidance: dict[str, Guidance]  # the teacher's

    @property
    def blend(self) -> Blend:
        return conditioning.keep_conditions(self.video, self.audio)

    @property
    def masks(self) -> AV:
        return AV(self.video.denoise_mask, self.audio and self.audio.denoise_mask)

    def start(self, generator: torch.Generator) -> AV:
        return noisy_start(self.video, self.audio, generator=generator)

    def denoiser(self, model: Model, levels: Tensor, *, is_guided: bool) -> Denoise:
        """x and sigma to the blended clean estimate, by the code that generation runs."""

        def modality(name: str, state: LatentState | None) -> GuidedModality | None:
            if state is None:
                return None
            if not is_guided:
                return GuidedModality(state, self.contexts[name])
            guidance, negative = self.guidance[name], self.negatives.get(name)
            return GuidedModality(state, self.contexts[name], negative, guidance)

        denoise = GuidedDenoiser(
            model, levels, modality("video", self.video), modality("audio", self.audio)
        )
        blend = self.blend
        return lambda x, sigma: blend(denoise(x, sigma))

    def noised(self, clean: AV, generator: torch.Generator) -> tuple[Noised, Noised | None]:
        """Clips (B, N, C) at noise levels of their own, for flow matching."""
        assert clean.video is not None
        count = len(clean.video)
        sigma = sample_sigmas(count, generator, shift=0.8, shifted_share=1.0).to(clean.video)

        def of(name: str, tokens: Tensor, state: LatentState) -> Noised:
            noise = torch.randn(tokens.shape, generator=generator).to(tokens)
            timesteps = state.denoise_mask * sigma[:, None, None]
            noisy = torch.lerp(tokens, noise, timesteps)
            context = self.contexts[name]
            modality = Modality(noisy, sigma, timesteps, state.positions, context)
            return Noised(modality, noise - tokens, state.denoise_mask)

        video = of("video", clean.video, self.video)
        if clean.audio is None or self.audio is None:
            return video, None
        return video, of("audio", clean.audio, self.audio)


def distill(config: DistillConfig) -> list[Path]:
    """Runs the distillation to its end or to a signal; returns the files that it published.

    A run that was stopped goes on where it was and publishes nothing yet. Raises InputError for a
    configuration that cannot work, and for a loss that is not finite.
    """
    torch.manual_seed(config.seed)
    maker = TaskMaker.open(config)
    networks = build_networks(config, maker.models)
    optimizers = build_optimizers(config, networks.weights)
    own = [optimizer for name, optimizer in optimizers.items() if name.startswith("student")]
    fakes = [optimizer for name, optimizer in optimizers.items() if name.startswith("fake")]
    student, average = networks.weights["student"], networks.weights["average"]
    run = Run(
        config.output_dir,
        {**networks.weights, **optimizers},
        config,
        total_steps=config.total_steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
    )
    measure = held_out_distance(maker, networks)
    for step in run.steps():
        generator = run.generator(step)
        task = maker.draw(run.numpy_generator(step), config.batch_size)
        is_short = bool(torch.rand((), generator=generator) < config.four_step_share)
        levels = schedulers.distilled(4 if is_short else 8)
        set_learning_rate(own, learning_rate(config, step))
        figures: dict[str, float] = {}
        if step < config.trajectory_steps:
            figures = follow_trajectory(config, networks, task, levels, generator)
            is_taught = True
        else:
            is_taught = step >= config.trajectory_steps + config.fake_warmup
            figures = match_distribution(
                config, networks, task, levels, generator, fakes, is_taught=is_taught
            )
        if is_taught:
            take_step(own, student, config.max_grad_norm)
            update_average(average, student, step, config.ema_decay)
        is_time = (step + 1) % config.eval_every == 0 or step + 1 == config.total_steps
        run.log(**figures, **(measure(networks.average) if is_time else {}))
    if run.step < config.total_steps:
        return []
    return publish(
        maker.models.checkpoint,
        networks.changes(),
        config.output_dir,
        rank=config.rank,
        writes_model=config.mode == "full",
    )


# The two stages.


def follow_trajectory(
    config: DistillConfig,
    networks: Networks,
    task: Task,
    levels: Tensor,
    generator: torch.Generator,
) -> dict[str, float]:
    """Adds the gradients of one run of the student, each step against the guided teacher's."""
    teach = task.denoiser(networks.teacher, levels, is_guided=True)
    learn = task.denoiser(networks.student, levels, is_guided=False)
    spans = list(pairwise(levels.tolist()))
    coins = torch.rand(len(spans), generator=generator).tolist()
    learnt = [coin < (s - e) / FULL_SHARE_FROM for coin, (s, e) in zip(coins, spans, strict=True)]
    x = task.start(generator)
    losses: list[AV] = []
    for (start, end), is_learnt in zip(spans, learnt, strict=True):
        with torch.set_grad_enabled(is_learnt):
            denoised = learn(x, start)
        if is_learnt:
            with torch.no_grad():
                target = trajectory_target(teach, x, start, end, config.max_teacher_step)
            loss = velocity_distance(denoised, target, start, task.masks)
            weight = max(start - end, FULL_SHARE_FROM)
            (weight * weighted(loss, config.audio_weight)).backward()
            losses.append(loss.map(Tensor.detach) * weight)
        x = euler_step(x, denoised.map(Tensor.detach), start, end)
    return log_figures(total(losses), config.audio_weight)


@torch.no_grad()
def trajectory_target(teach: Denoise, x: AV, start: float, end: float, max_step: float) -> AV:
    """The clean estimate whose single Euler step leads where the teacher's many steps lead."""
    steps = max(1, math.ceil((start - end) / max_step - 1e-6))
    arrived = euler(teach, x, torch.linspace(start, end, steps + 1))
    return x - (arrived - x) * (start / (end - start))


def match_distribution(
    config: DistillConfig,
    networks: Networks,
    task: Task,
    levels: Tensor,
    generator: torch.Generator,
    fakes: list[Optimizer],
    *,
    is_taught: bool,
) -> dict[str, float]:
    """Trains the fake score on the student's clips, then adds the student's gradients."""
    learn = task.denoiser(networks.student, levels, is_guided=False)
    spans = list(pairwise(levels.tolist()))
    x = task.start(generator)
    for number, (start, end) in enumerate(spans):
        with torch.set_grad_enabled(is_taught and number >= len(spans) - config.matching_depth):
            x = euler_step(x, learn(x, start), start, end)
    made = x.map(Tensor.detach)
    fake_loss = 0.0
    for _ in range(config.fake_updates):
        video, audio = task.noised(made, generator)
        velocities = networks.fake(video.modality, audio and audio.modality)
        loss = AV(*(
            None if noised is None or velocity is None else velocity_loss(velocity, noised)
            for velocity, noised in zip(velocities, (video, audio), strict=True)
        ))  # fmt: skip
        weighted(loss, config.audio_weight).backward()
        take_step(fakes, networks.weights["fake"], config.max_grad_norm)
        fake_loss = float(weighted(loss, config.audio_weight).detach())
    if not is_taught:
        return {"fake": fake_loss}
    # One level for the batch, away from both ends, where the scores say nothing.
    sigma = 0.02 + 0.96 * float(sample_sigmas(1, generator, shift=0.8, shifted_share=1.0))
    with torch.no_grad():
        noise = made.map(lambda t: torch.randn(t.shape, generator=generator).to(t))
        noisy = task.blend(made * (1 - sigma) + noise * sigma)
        real = task.denoiser(networks.teacher, levels, is_guided=True)(noisy, sigma)
        fake = task.denoiser(networks.fake, levels, is_guided=False)(noisy, sigma)
    push = matching_gradient(made, real, fake)
    loss = masked_mean(x.map(torch.mul, push), task.masks)  # its gradient in x is the push
    weighted(loss, config.audio_weight).backward()
    size = masked_mean(push.map(Tensor.square), task.masks)
    return {"fake": fake_loss} | log_figures(size, config.audio_weight)


def matching_gradient(made: AV, real: AV, fake: AV) -> AV:
    """DMD's gradient in a clip (B, N, C): fake minus real estimate, by the size of the real error.

    Zero where the fake score agrees with the teacher's (arXiv:2311.18828, eq. 7 and 8).
    """

    def push(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        size = (made - real).abs().mean(dim=(1, 2), keepdim=True)
        return (fake - real) / size.clamp(min=1e-6)

    return made.map(push, real, fake)


# Losses, one number a modality.


def masked_mean(values: AV, masks: AV) -> AV:
    def of(value: Tensor, mask: Tensor) -> Tensor:
        return (value * mask).sum() / (mask.sum() * value.shape[2]).clamp(min=1)

    return values.map(of, masks)


def velocity_distance(denoised: AV, target: AV, sigma: float, masks: AV) -> AV:
    """Mean squared difference of the velocities that two clean estimates stand for."""
    difference = (denoised - target) / sigma
    return masked_mean(difference.map(lambda d: d.float().square()), masks)


def weighted(loss: AV, audio_weight: float) -> Tensor:
    assert loss.video is not None
    return loss.video if loss.audio is None else loss.video + audio_weight * loss.audio


def total(losses: list[AV]) -> AV:
    added = losses[0]
    for loss in losses[1:]:
        added = added + loss
    return added


def log_figures(loss: AV, audio_weight: float) -> dict[str, float]:
    figures = {"loss": float(weighted(loss, audio_weight)), "video": float(loss.video or 0)}
    return figures if loss.audio is None else figures | {"audio": float(loss.audio)}


def held_out_distance(maker: "TaskMaker", networks: Networks) -> Callable[[Model], dict]:
    """How far a student's clips end from the teacher's of the same prompts and noise.

    Mean squared distance over the variance of the teacher's clips; 8 steps.
    """
    task = maker.draw(np.random.default_rng(2**31), HELD_OUT, first_frame=False)
    x = task.start(torch.Generator().manual_seed(2**31))
    levels = schedulers.distilled(8)
    teach = task.denoiser(networks.teacher, levels, is_guided=True)
    theirs, max_step = x, maker.config.max_teacher_step
    with torch.no_grad():
        for start, end in pairwise(levels.tolist()):
            target = trajectory_target(teach, theirs, start, end, max_step)
            theirs = euler_step(theirs, target, start, end)

    @torch.no_grad()
    def measure(model: Model) -> dict[str, float]:
        ours = euler(task.denoiser(model, levels, is_guided=False), x, levels)
        apart = ours.map(lambda a, b: (a - b).square().mean() / b.var(), theirs)
        names = {"far_video": apart.video, "far_audio": apart.audio}
        return {name: float(value) for name, value in names.items() if value is not None}

    return measure


# Prompts and clips.


@dataclass(frozen=True)
class TaskMaker:
    """Draws batches of clips to make from a data set's captions and shapes."""

    config: DistillConfig
    models: ModelSet
    data: LatentDataset
    projector: TextProjector
    negatives: dict[str, Tensor]  # (1, S, D); empty where nothing is guided by text
    guidance: dict[str, Guidance]

    @classmethod
    def open(cls, config: DistillConfig) -> "TaskMaker":
        """Raises InputError for a model or a folder that cannot be used."""
        models = ModelSet.open(
            config.model, text_encoder=config.text_encoder_path, device=config.device
        )
        if models.is_distilled:
            raise InputError(f"model: {models.name} is distilled already; give the -dev model.")
        if config.mode == "lora" and config.compile:
            raise InputError(
                "compile: the shared network of mode lora changes with who computes; set false."
            )
        section = models.checkpoint.config.get("text_encoder") or {}
        data = LatentDataset(config.latents, int(section.get("max_length", 1024)))
        if any("video" not in bucket.shapes for bucket in data.buckets):
            raise InputError(f"{config.latents}: has clips without a picture; leave them out.")
        values = {"prompt": "-", **config.guidance}
        request = GenerationRequest.from_dict(values).resolved(models.profile)
        contexts = encoding.encode_prompts(models, request, Progress())
        negatives = contexts[1]._asdict() if len(contexts) > 1 else {}
        return cls(
            config,
            models,
            data,
            load_text_projector(models.checkpoint, device=models.device, dtype=torch.float32),
            {name: context.float() for name, context in negatives.items()},
            {name: stages.guidance_of(request, name) for name in ("video", "audio")},
        )

    def draw(self, rng: Any, count: int, *, first_frame: bool = True) -> Task:
        """`count` clips of one bucket, fewer where they are larger; rng is numpy's."""
        bucket = self.data.draw_bucket(rng)
        count = self.data.as_many_tokens(bucket, count)
        batch = self.data.draw(bucket, [rng] * count, caption_dropout=0.0)
        given = first_frame and rng.random() < self.config.first_frame_p
        return self.task_of(batch, given)

    def task_of(self, batch: Batch, has_first_frame: bool) -> Task:
        models, device = self.models, self.models.device
        assert batch.video is not None
        scale, fps = models.profile.scale, batch.fps or models.profile.frame_rate
        grid = VideoGrid(VideoLatentShape(*batch.video.shape), scale, fps)
        video = conditioning.video_state(grid, device=device)
        if has_first_frame:
            frame = batch.video[:, :, :1].to(device)
            video = conditioning.replace_frames(video, grid, frame)
        audio = None
        if batch.audio is not None and models.profile.has_audio:
            config = models.audio_config
            sound_grid = AudioGrid(
                AudioLatentShape(*batch.audio.shape), config.sampling_rate, config.hop_length
            )
            audio = conditioning.audio_state(sound_grid, device=device)
        with torch.no_grad():
            contexts = encode_text(self.projector, batch, device)
        negatives = {
            name: context.expand_as(contexts[name]) for name, context in self.negatives.items()
        }
        return Task(video, audio, contexts, negatives, self.guidance)


# Networks and optimisers.


def build_networks(config: DistillConfig, models: ModelSet) -> Networks:
    """Teacher, student and fake score, all the teacher at first."""
    device = models.device

    def load() -> nn.Module:
        return load_transformer(models.checkpoint, device=device, dtype=torch.float32)

    if config.mode == "lora":
        transformer = load_transformer(models.checkpoint, device=device, dtype=models.dtype)
        shared = share_weights(
            transformer,
            ("student", "fake", "average"),
            rank=config.rank,
            generator=torch.Generator().manual_seed(config.seed),
        )
        roles = {
            role: _in_precision(shared.speaking_as(role), config.precision, device)
            for role in ("teacher", "student", "fake", "average")
        }
        shared.changes["average"].requires_grad_(False)
        return Networks(
            roles["teacher"], roles["student"], roles["fake"], roles["average"],
            dict(shared.changes.items()), lambda: shared.low_rank_changes("average"),
        )  # fmt: skip

    teacher, student, fake = load(), load(), load()
    for network in (student, fake):
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.requires_grad_(True)
    average = averaged_copy(student)
    networks = {"teacher": teacher, "student": student, "fake": fake, "average": average}
    if config.compile:
        keep_compiled_code(teacher.config)
        for network in networks.values():
            compile_blocks(network)  # pyright: ignore[reportArgumentType]

    def changes() -> Changes:
        theirs = dict(teacher.named_parameters())
        return {
            name: average.get_submodule(name).weight - theirs[f"{name}.weight"]  # pyright: ignore
            for name, layer in teacher.named_modules()
            if isinstance(layer, nn.Linear)
        }

    computing = {n: _in_precision(net, config.precision, device) for n, net in networks.items()}
    weights = {name: network for name, network in networks.items() if name != "teacher"}
    return Networks(**computing, weights=weights, changes=changes)


def _in_precision(network: Callable, precision: str, device: torch.device) -> Model:
    """Under autocast for one call, so that no cast weight outlives an optimiser's step."""

    def model(
        video: Modality | None, audio: Modality | None, perturbations: Any = None
    ) -> tuple[Tensor | None, Tensor | None]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            velocities = network(video, audio, perturbations)
        return tuple(None if v is None else v.float() for v in velocities)  # pyright: ignore

    return model


def build_optimizers(config: DistillConfig, weights: dict[str, nn.Module]) -> dict[str, Optimizer]:
    """For the student Muon and AdamW, for the fake score and for LoRAs AdamW."""
    fake = AdamW(_trained(weights["fake"]), lr=config.adamw_lr, betas=(0.0, 0.99), weight_decay=0)
    if config.mode == "lora":
        own = {"": AdamW(_trained(weights["student"]), lr=config.adamw_lr, weight_decay=0)}
    else:
        own = muon_and_adamw(
            weights["student"], muon_lr=config.muon_lr, adamw_lr=config.adamw_lr, iterations=3
        )
    named = {f"student {name}".strip(): optimizer for name, optimizer in own.items()}
    # A state's names must not meet those of the weights.
    return {f"{name} optimizer": optimizer for name, optimizer in named.items()} | {
        "fake optimizer": fake
    }


def _trained(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def take_step(optimizers: list[Optimizer], module: nn.Module, max_grad_norm: float) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learning_rate(config: DistillConfig, step: int) -> float:
    """The student's share of its rates: each stage falls to 0, matching from a fraction."""
    if step < config.trajectory_steps:
        return warmup_then_linear_decay(step, config.trajectory_steps, config.warmup_steps)
    done = step - config.trajectory_steps
    return config.matching_lr * warmup_then_linear_decay(done, config.matching_steps, 1)
