"""Trains a reward model on latents, with a Bradley-Terry loss on pairs of which one is better.

    aiprod reward train configs/nano/reward.yaml

First come clips of the world beside spoilt ones (`preferences.py`): each axis learns its own
degradations, mild before strong, and to leave those of the other picture axis alone. With a
`generator` the model then also sees that model's clips: those that the world's judge prefers, and
the clean estimates of early steps. An early estimate is trained to say of two clips what the
reward model itself says of them when they are finished, so that it forecasts the very score by
which they will be chosen. Latents that were merely noised would ask it to denoise as well as the
generator does; the generator's own estimates are at hand in every run and cost nothing.

The network is small enough for one core. A run resumes where it stopped.
"""

import json
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import load_reward
from aiprod_core.model.reward import AXES, RewardConfig, RewardModel, init_reward, pooled
from aiprod_core.types import AV
from aiprod_pipelines import decoding
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_trainer.config import Section
from aiprod_trainer.evaluation.prompts import Prompt
from aiprod_trainer.evaluation.scores import ATTRIBUTES
from aiprod_trainer.optimizers import muon_and_adamw, set_learning_rate, warmup_then_linear_decay
from aiprod_trainer.preferences import (
    Sampled,
    encode_texts,
    grids_of,
    prepare_pairs,
    read_parts,
    sample_clips,
    swapped_words,
)
from aiprod_trainer.run import Run, averaged_copy, update_average
from aiprod_trainer.world.captions import describe
from aiprod_trainer.world.judge import agreement, judge
from aiprod_trainer.world.scene import sample_scene

HELD_OUT_SEED = 1_000_000  # added to the seed for what no training sees


class RewardTrainingConfig(Section):
    model: str  # what has the codecs and the text encoder: nano, a file, a folder
    text_encoder_path: Path | None = None
    name: str = "nano"  # of the published file: NAME-reward.safetensors
    output_dir: Path = Path("runs/reward")
    start: Path | None = None  # an earlier NAME-reward.safetensors to go on from
    network: dict[str, Any] = Field(default_factory=dict)  # fields of RewardConfig
    world: str = "v1"
    size: int = 64  # pixels
    clips: int = 768  # of the world
    held_out: int = 128
    batch_size: int = 6  # clips of the world a step, each with its spoilt forms
    steps: int = 1200
    warmup_steps: int = 30
    muon_lr: float = 3e-3
    adamw_lr: float = 1e-3
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    jitter: float = 0.05  # noise on latents: what only a codec could see is no reason to prefer
    others_weight: float = 0.05  # of leaving the other axes' degradations alone
    captioned: Path | None = None  # clips of prepare_world: more words for the text axis
    captioned_batch: int = 16
    generator: str | None = None  # a model whose own clips are judged and forecast
    prompts: int = 96
    seeds: int = 4  # clips of each prompt
    judged: int = 64  # prompts whose clips the world's judge looks at
    early_steps: tuple[int, ...] = (4, 5, 6, 8)  # after which the clean estimate is kept
    generation: dict[str, Any] = Field(default_factory=dict)  # settings of the generator's clips
    generated_batch: int = 4  # prompts a step
    eval_every: int = 200
    save_every_s: float = 120.0
    seed: int = 0


@dataclass(frozen=True)
class Grids:
    """Where the tokens of all clips lie: (1, 3, N, 2) and (1, 1, T, 2)."""

    video: Tensor
    audio: Tensor

    @classmethod
    def of(cls, grids: tuple[VideoGrid, AudioGrid]) -> "Grids":
        return cls(grids[0].positions(), grids[1].positions())


def train(config: RewardTrainingConfig) -> Path:
    """Prepares what is missing, trains, and writes NAME-reward.safetensors; returns its path."""
    folder = config.output_dir
    models = ModelSet.open(config.model, text_encoder=config.text_encoder_path, device="cpu")
    common = {"world": config.world, "size": config.size}
    for name, clips, seed in (
        ("pairs", config.clips, config.seed),
        ("held_out", config.held_out, config.seed + HELD_OUT_SEED),
    ):
        prepare_pairs(models, folder / name, clips=clips, seed=seed, **common)
    pairs = read_parts(folder / "pairs", "pairs-*.safetensors")
    held_out = read_parts(folder / "held_out", "pairs-*.safetensors")
    grids = Grids.of(grids_of(models, pairs["video"][0, 0], pairs["audio"][0, 0], fps=12.0))
    generated = own_grids = None
    if config.generator is not None:
        generated = prepare_generated(config, folder / "generated")
        first = generated["video"][0, 0], generated["audio"][0, 0]
        own_grids = Grids.of(grids_of(models, *first, models.profile.frame_rate))
    captioned = None if config.captioned is None else Captioned(models, config.captioned)
    model = build(config, pairs)
    average = averaged_copy(model)
    optimizers = muon_and_adamw(
        model, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr, iterations=3
    )
    run = Run(
        folder / ("forecast" if generated is not None else "world"),
        {"model": model, "average": average, **optimizers},
        config,
        total_steps=config.steps,
        seed=config.seed,
        save_every_s=config.save_every_s,
    )
    for step in run.steps():
        rng = run.numpy_generator(step)
        factor = warmup_then_linear_decay(step, config.steps, config.warmup_steps)
        set_learning_rate(optimizers.values(), factor)
        rows = rng.choice(len(pairs["video"]), config.batch_size, replace=False)
        batch = {name: tensor[torch.from_numpy(rows)] for name, tensor in pairs.items()}
        # PyTorch's fused attention takes twice as long backwards for so few tokens on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            losses = world_losses(model, batch, grids, run.generator(step), config)
            if captioned is not None:
                losses["captioned"] = captioned.loss(model, grids, rng, config.captioned_batch)
            if generated is not None and own_grids is not None:
                losses |= generated_losses(model, average, generated, own_grids, rng, config)
            loss = torch.stack(list(losses.values())).sum()
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        update_average(average, model, step, config.ema_decay)
        if step % 20 == 0:
            run.log(loss=loss.item(), **{name: value.item() for name, value in losses.items()})
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            scores = pairwise_accuracy(average, held_out, grids)
            run.log(**{f"held_{axis}": value for axis, value in scores.items()})
    path = folder / f"{config.name}-reward.safetensors"
    publish(path, average, models)
    return path


def build(config: RewardTrainingConfig, pairs: dict[str, Tensor]) -> RewardModel:
    """A new network for these latents, or that of `start`."""
    if config.start is not None:
        model = load_reward(open_checkpoint(config.start), dtype=torch.float32)
        for parameter in model.parameters():  # those of the file are mapped from it
            parameter.data = parameter.data.clone()
        return model.train().requires_grad_(True)
    sizes = {
        "video_channels": pairs["video"].shape[2],
        "audio_channels": pairs["audio"].shape[2] * pairs["audio"].shape[4],
        "text_width": pairs["text"].shape[-1],
    }
    try:
        network = RewardConfig(**sizes, **config.network)
    except TypeError as error:
        raise InputError(f"network: {error}") from None
    model = RewardModel(network)
    init_reward(model, torch.Generator().manual_seed(config.seed))
    return model


def publish(path: Path, model: nn.Module, models: ModelSet) -> None:
    assert isinstance(model, RewardModel)
    metadata = {
        "model_version": models.checkpoint.metadata.get("model_version", ""),
        "config": {"reward": model.config.to_metadata()},
    }
    save_checkpoint(path, [(key_maps.REWARD, model)], metadata, dtype=torch.float16)


# ------------------------------------------------------------------------------ pairs of the world


def bradley_terry(better: Tensor, worse: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of -log P(better preferred), P = sigmoid of the difference of scores (B,)."""
    loss = F.softplus(worse - better)
    return loss.mean() if weight is None else (loss * weight).sum() / weight.sum().clamp_min(1)


def in_order(best: Tensor, mild: Tensor, strong: Tensor, weight: Tensor | None = None) -> Tensor:
    """The loss of three grades."""
    pairs = ((best, mild), (best, strong), (mild, strong))
    return torch.stack([bradley_terry(a, b, weight) for a, b in pairs]).mean()


def world_scores(model: RewardModel, batch: dict[str, Tensor], grids: Grids) -> dict[str, Tensor]:
    """Scores of each clip's forms: visual and motion (B, 5), sync (B, 4), text (B, 3).

    The fourth sound is another clip's, the third caption too.
    """
    count = len(batch["video"])
    level = model.sigma(torch.zeros(count, 1))
    wide = level[:1].expand(5 * count, -1, -1)
    seen = model.look(batch["video"].float().flatten(0, 1), grids.video, wide)
    heard = model.listen(batch["audio"].float().flatten(0, 1), grids.audio, wide[: 3 * count])
    scores = {
        "visual": model.visual(pooled(seen)).view(count, 5),
        "motion": model.motion(seen, batch["video"].shape[3]).view(count, 5),
    }
    seen, heard = seen.unflatten(0, (count, 5))[:, 0], heard.unflatten(0, (count, 3))
    sounds = [*heard.unbind(1), heard[:, 0].roll(1, 0)]
    scores["sync"] = torch.stack(
        [model.compare(seen, sound, grids.video, grids.audio) for sound in sounds], 1
    )
    texts, masks = batch["text"].float(), batch["text_mask"]
    longest = int(masks.sum(-1).max())
    texts, masks = texts[:, :, :longest], masks[:, :, :longest]
    captions = [(texts[:, k], masks[:, k]) for k in range(2)]
    captions.append((texts[:, 0].roll(1, 0), masks[:, 0].roll(1, 0)))
    scores["text"] = torch.stack(
        [model.read(text, mask, seen, heard[:, 0], level) for text, mask in captions], 1
    )
    return scores


def world_losses(
    model: RewardModel,
    batch: dict[str, Tensor],
    grids: Grids,
    generator: torch.Generator,
    config: RewardTrainingConfig,
) -> dict[str, Tensor]:
    """The loss of each axis on clips of the world and their spoilt forms."""
    batch = dict(batch)
    for name in ("video", "audio"):
        clean = batch[name].float()
        noise = torch.randn(clean.shape, generator=generator)
        batch[name] = clean + config.jitter * noise
    scores = world_scores(model, batch, grids)
    visual, motion = scores["visual"].unbind(1), scores["motion"].unbind(1)
    sync, text = scores["sync"].unbind(1), scores["text"].unbind(1)
    weight = batch["has_sync"].float()
    losses = {
        "visual": in_order(visual[0], visual[1], visual[2]),
        "motion": in_order(motion[0], motion[3], motion[4]),
        "text": (bradley_terry(text[0], text[1]) + bradley_terry(text[0], text[2])) / 2,
        "sync": in_order(sync[0], sync[1], sync[2], weight)
        + bradley_terry(sync[0], sync[3], weight) / 4,
    }
    leaks = [visual[3] - visual[0], visual[4] - visual[0], motion[1] - motion[0]]
    losses["others"] = config.others_weight * torch.stack(leaks).square().mean()
    return losses


class Captioned:
    """Clips of the world with their captions, as `prepare_world` writes them; words are encoded
    when they are drawn, so that each draw is told apart from other wrong ones."""

    def __init__(self, models: ModelSet, folder: Path) -> None:
        self.models = models
        files = sorted(folder.glob("part-*.safetensors"))
        if not files:
            raise InputError(f"captioned {folder}: no part-*.safetensors; see prepare_world.")
        self.parts = [load_file(file) for file in files]
        self.captions = [
            [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
            for file in files
        ]

    def loss(
        self, model: RewardModel, grids: Grids, rng: np.random.Generator, count: int
    ) -> Tensor:
        """A caption against the same with one attribute wrong, and against another clip's."""
        part = int(rng.integers(len(self.parts)))
        captions = self.captions[part]
        true, wrong, rows = [], [], []
        while len(rows) < count:
            row = int(rng.integers(len(captions)))
            text = captions[row][int(rng.integers(len(captions[row])))]
            changed = swapped_words(text, rng)
            if changed is not None:
                true, wrong, rows = [*true, text], [*wrong, changed], [*rows, row]
        with torch.no_grad():
            text, mask = encode_texts(self.models, [*true, *wrong])
        longest = int(mask.sum(-1).max())
        text, mask = text[:, :longest].float(), mask[:, :longest]
        video, audio = (self.parts[part][name][rows].float() for name in ("video", "audio"))
        level = model.sigma(torch.zeros(count, 1))
        seen = model.look(video, grids.video, level)
        heard = model.listen(audio, grids.audio, level)
        said, changed, others = (
            model.read(text[index], mask[index], seen, heard, level)
            for index in (
                torch.arange(count),
                torch.arange(count, 2 * count),
                torch.arange(count).roll(1),
            )
        )
        return bradley_terry(said, changed) + bradley_terry(said, others) / 2


@torch.no_grad()
def pairwise_accuracy(
    model: nn.Module, pairs: dict[str, Tensor], grids: Grids, batch: int = 16
) -> dict[str, float]:
    """The share of pairs in which the better clip scores higher, for each axis.

    Pairs are a clip and one of its two spoilt forms; for text its caption and that with one wrong
    attribute.
    """
    assert isinstance(model, RewardModel)
    right: dict[str, list[bool]] = {axis: [] for axis in AXES}
    for start in range(0, len(pairs["video"]), batch):
        part = {name: tensor[start : start + batch] for name, tensor in pairs.items()}
        scores = world_scores(model, part, grids)
        has_sync = part["has_sync"]
        for axis, spoilt in (("visual", (1, 2)), ("motion", (3, 4)), ("text", (1,))):
            for k in spoilt:
                right[axis] += (scores[axis][:, 0] > scores[axis][:, k]).tolist()
        for k in (1, 2):
            right["sync"] += (scores["sync"][:, 0] > scores["sync"][:, k])[has_sync].tolist()
    return {axis: round(mean(values), 4) if values else 0.0 for axis, values in right.items()}


# ------------------------------------------------------------------------ clips of a generator


def prepare_generated(config: RewardTrainingConfig, folder: Path) -> dict[str, Tensor]:
    """The generator's clips of `prompts` prompts, made once.

    video (P, seeds, C, F, H, W), audio; early_video (P, seeds, steps, ...), early_audio and sigma
    (steps,); text (P, S, D), text_mask; judged_text and judged_sync (P, seeds): the judge's share
    of what was stated that is right, and minus the sync error in ms; NaN where it did not look.
    """
    path = folder / "generated.safetensors"
    if not path.exists():
        assert config.generator is not None
        models = ModelSet.open(config.generator, device="cpu")
        rng = np.random.default_rng([config.seed, 77])
        prompts = []
        for _ in range(config.prompts):
            scene = sample_scene(rng, world=config.world)
            caption = describe(scene, rng)
            prompts.append(Prompt(caption.text, scene, caption.stated))
        seeds = [int(s) for s in rng.integers(2**31, size=config.prompts * config.seeds)]
        tensors = generated_tensors(
            models, prompts, seeds, config.early_steps, config.generation, config.judged
        )
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return read_parts(folder, "generated.safetensors")


def generated_tensors(
    models: ModelSet,
    prompts: list[Prompt],
    seeds: list[int],  # as many for each prompt, one prompt's after another's
    early_steps: tuple[int, ...],
    settings: dict[str, Any],
    judged: int,  # prompts, from the first on, whose clips are decoded and judged
) -> dict[str, Tensor]:
    """What `prepare_generated` describes, of any prompts."""
    per_prompt = len(seeds) // len(prompts)
    texts = [prompt.text for prompt in prompts for _ in range(per_prompt)]
    sampled = sample_clips(models, texts, seeds, keep_steps=early_steps, settings=settings)
    text, mask = encode_texts(models, [prompt.text for prompt in prompts])
    verdicts = torch.full((len(prompts), per_prompt, 2), torch.nan)
    for number in track(range(min(judged, len(prompts))), description="judged", transient=True):
        for k in range(per_prompt):
            verdict = judged_clip(models, prompts[number], sampled, number * per_prompt + k)
            verdicts[number, k] = torch.tensor(verdict)

    def stacked(name: str) -> Tensor:
        steps = [getattr(latents, name) for _, latents in sampled.estimates.values()]
        return torch.stack(steps, 1).unflatten(0, (-1, per_prompt)).contiguous()

    assert sampled.finished.video is not None and sampled.finished.audio is not None
    return {
        "video": sampled.finished.video.unflatten(0, (-1, per_prompt)).contiguous(),
        "audio": sampled.finished.audio.unflatten(0, (-1, per_prompt)).contiguous(),
        "early_video": stacked("video"),
        "early_audio": stacked("audio"),
        "sigma": torch.tensor([sigma for sigma, _ in sampled.estimates.values()]),
        "text": text,
        "text_mask": mask,
        "judged_text": verdicts[..., 0].contiguous(),
        "judged_sync": verdicts[..., 1].contiguous(),
    }


@torch.inference_mode()
def judged_clip(
    models: ModelSet, prompt: Prompt, sampled: Sampled, index: int
) -> tuple[float, float]:
    """The judge's share right of what the prompt states, and minus the sync error in ms."""
    video, audio = (
        latent[index : index + 1].float()
        for latent in (sampled.finished.video, sampled.finished.audio)
        if latent is not None
    )
    fps, quiet = models.profile.frame_rate, Progress()
    frames = torch.cat(list(decoding.decode_video(models, video, quiet))).numpy()
    sound = decoding.decode_audio(models, audio, len(frames) / fps, quiet)
    assert prompt.scene is not None
    found = judge(frames, sound.samples, sound.sample_rate, fps)
    agrees = agreement(found, prompt.scene)
    right = [bool(agrees[a]) for a in ATTRIBUTES if a in prompt.stated and a in agrees]
    is_eventful = "motion" in prompt.stated and bool(prompt.scene.events)
    error = np.nan
    if is_eventful:  # nothing seen or heard where something was asked for is no sync either
        error = found.sync_ms if found.sync_ms is not None else 500.0
    return (mean(right) if right else np.nan), -error


def score_latents(
    model: RewardModel,
    latents: AV,  # (K, ...)
    text: Tensor,  # (K, S, D)
    mask: Tensor,
    grids: Grids,
    sigma: float = 0.0,
) -> Tensor:
    """(K, 4) scores in the order of AXES."""
    assert latents.video is not None and latents.audio is not None
    longest = int(mask.sum(-1).max())
    scores = model(
        latents.video.float(),
        latents.audio.float(),
        text[:, :longest].float(),
        mask[:, :longest],
        torch.full((len(text),), sigma),
        video_positions=grids.video,
        audio_positions=grids.audio,
    )
    return torch.stack([scores[axis] for axis in AXES], dim=1)


def summed_scores(
    model: RewardModel, latents: AV, text: Tensor, mask: Tensor, grids: Grids, sigma: float = 0.0
) -> Tensor:
    """(K,) the sum of all axes, 32 clips at a time."""
    assert latents.video is not None and latents.audio is not None
    sums = []
    for k in range(0, len(text), 32):
        few = slice(k, k + 32)
        clips = AV(latents.video[few], latents.audio[few])
        sums.append(score_latents(model, clips, text[few], mask[few], grids, sigma).sum(1))
    return torch.cat(sums)


def generated_losses(
    model: RewardModel,
    teacher: nn.Module,  # the running average: says how a finished clip scores
    data: dict[str, Tensor],
    grids: Grids,
    rng: np.random.Generator,
    config: RewardTrainingConfig,
) -> dict[str, Tensor]:
    """Early estimates against the finished clips' scores, finished clips against the judge."""
    assert isinstance(teacher, RewardModel)
    prompts, per_prompt = data["video"].shape[:2]
    rows = torch.from_numpy(
        rng.choice(prompts, min(config.generated_batch, prompts), replace=False)
    )
    step = int(rng.integers(len(data["sigma"])))
    text, mask = (
        data[name][rows].repeat_interleave(per_prompt, 0) for name in ("text", "text_mask")
    )
    finished = AV(data["video"][rows].flatten(0, 1), data["audio"][rows].flatten(0, 1))
    early = AV(
        data["early_video"][rows, :, step].flatten(0, 1),
        data["early_audio"][rows, :, step].flatten(0, 1),
    )
    with torch.no_grad():
        target = score_latents(teacher, finished, text, mask, grids)
    said = score_latents(model, early, text, mask, grids, float(data["sigma"][step]))
    forecast = []
    for a, b in combinations(range(len(text)), 2):
        # Pairs of one prompt are those that a choice of seeds is made of.
        weight = 1.0 if a // per_prompt == b // per_prompt else 0.2
        wanted = torch.sigmoid(target[a] - target[b])
        loss = F.binary_cross_entropy_with_logits(said[a] - said[b], wanted, reduction="none")
        forecast.append(weight * loss.mean())
    losses = {"forecast": torch.stack(forecast).mean()}
    judged = [(axis, data[name][rows]) for axis, name in ((2, "judged_text"), (3, "judged_sync"))]
    if any(bool(values.isfinite().any()) for _, values in judged):
        own = score_latents(model, finished, text, mask, grids).unflatten(0, (-1, per_prompt))
        pairs = []
        for (axis, values), margin in zip(judged, (0.01, 40.0), strict=True):
            for a, b in permutations(range(per_prompt), 2):
                is_better = (values[:, a] > values[:, b] + margin).float()
                pairs.append(bradley_terry(own[:, a, axis], own[:, b, axis], is_better))
        losses["judged"] = torch.stack(pairs).sum() / per_prompt
    return losses
