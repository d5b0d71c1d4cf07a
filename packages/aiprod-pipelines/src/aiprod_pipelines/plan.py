"""The flight plan: what a clip will take in memory and time, and where its weights should wait.

Only headers are read. Each network that the run uses is built on the meta device at its real size
and called with the shapes of this request (`aiprod_core.footprint`): that gives floating-point
operations and the memory of activations. Weights are counted from the header. The first way of
keeping weights that fits the free memory is taken: those that change nothing but speed come in
order of speed, and weights are quantised only where that is asked for, for it changes the clip.

Seconds come from earlier runs of the same stage on this machine, between the nearest in size;
before there is one, from half of what a matrix product runs at just now.
"""

import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.errors import InputError
from aiprod_core.footprint import Footprint, footprint
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import KeyMap
from aiprod_core.model.audio_vae import AudioDecoder
from aiprod_core.model.transformer import Transformer
from aiprod_core.model.video_vae import VideoDecoder, VideoVAEConfig
from aiprod_core.model.vocoder import Vocoder, VocoderConfig
from aiprod_core.quantization.fp8 import is_cast_target
from aiprod_core.quantization.schemes import WEIGHT_BYTES
from aiprod_core.tiling import BySize, Tiling
from aiprod_core.types import Modality, VideoShape
from aiprod_pipelines import encoding, recipe, stages
from aiprod_pipelines.best_of import draft_of, early_step
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.tiles import choose_tiling, decode_bytes

# Ways to keep weights, in order of speed: offload, and whether guidance passes go one at a time.
LADDER = (("none", False), ("model", False), ("model", True), ("block", True), ("disk", True))
PLENTY = 8  # free memory over the model's size from which on nothing has to be planned
USABLE = 0.9  # of the free memory: the rest is for what others allocate meanwhile
FIRST_RATE = 0.5  # of a plain matrix product's rate, before anything was measured
MODEL_CALLS = {"heun": 2, "res-2s": 2}  # per step; other samplers call once
RATES_KEPT = 64  # observations a stage
# What decoding holds on a CPU beside its tensors: kernels and tiles as Winograd's products take
# them, and oneDNN's copies. Fitted: by so much plans fell short (benchmarks/plan.py on nano).
CPU_SCRATCH_BYTES = 48 * 2**20
# x264 looks ahead: 3.5 pictures in 4:2:0 for each of 50 frames (256 MB for 49 of 1024 x 1024).
ENCODER_FRAMES, ENCODER_PICTURES = 50, 3.5


@dataclass(frozen=True)
class StagePlan:
    """One stage: its work, the memory it holds, and how long it should take if that is known."""

    name: str
    flops: float
    weight_bytes: float  # resident while it runs
    activation_bytes: float
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """How a request will be run. `base_bytes` is what the process holds before."""

    offload: str
    quantization: str | None
    max_batch_size: int | None
    tile: str
    free_bytes: int
    base_bytes: int
    stages: tuple[StagePlan, ...]
    fits: bool

    @property
    def peak_bytes(self) -> float:
        """The most that the run holds, with the process itself on a CPU."""
        return self.base_bytes + max(s.weight_bytes + s.activation_bytes for s in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds or 0.0 for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes, "seconds": self.seconds}


def make_plan(pipeline: Pipeline, request: GenerationRequest) -> Plan:
    """The plan of a request to an opened pipeline. Raises InputError as the run itself would.

    Where the model's `offload` is not "auto", it is kept; the plan then says what that will take.
    """
    models = pipeline.models
    request = pipeline.resolve(request)
    free = models.free_memory()
    ways = [
        (offload, 1 if is_single else request.max_batch_size)
        for offload, is_single in LADDER
        if models.offload in ("auto", offload)
        # On a CPU there is no other memory that blocks could come from.
        and not (models.device.type == "cpu" and offload == "block" != models.offload)
    ]
    work = _Work(pipeline, request)
    plan = None
    for offload, batch in ways:
        if offload == "disk" and (request.loras or pipeline.distillation(request)):
            continue  # weights in the file cannot be added to
        found = work.stages(offload, batch)
        # Of a process that has planned; on a GPU its own memory is elsewhere.
        base = psutil.Process().memory_info().rss if models.device.type == "cpu" else 0
        needed = max(stage.weight_bytes + stage.activation_bytes for stage in found)
        fits = needed <= USABLE * free
        rates = Rates.open(models)
        timed = tuple(replace(s, seconds=rates.seconds(s.name, s.flops)) for s in found)
        plan = Plan(offload, models.quantization, batch, request.tile, free, base, timed, fits)
        if fits:
            return plan
    assert plan is not None  # a way is given, or the ladder has one that takes LoRAs
    return plan


def settle(
    pipeline: Pipeline, request: GenerationRequest, progress: Progress
) -> tuple[GenerationRequest, Plan | None]:
    """Decides what a model opened with offload "auto" leaves open, as the plan says.

    A model that takes a small part of the free memory needs no plan. Raises InputError where no
    way fits a given `max_memory`.
    """
    models = pipeline.models
    if models.offload != "auto":
        return request, None
    size = sum(info.num_bytes for info in models.checkpoint.tensors.values())
    if PLENTY * size < models.free_memory():
        models.offload = "none"
        return request, None
    plan = make_plan(pipeline, request)
    if not plan.fits and models.max_memory is not None:
        raise InputError(
            f"--max-memory: no way of keeping the weights fits; the smallest, offload "
            f"{plan.offload}, needs {plan.peak_bytes / 2**30:.1f} GiB. Give more, or try "
            "--quantization int8, fewer frames or a smaller picture."
        )
    models.offload = plan.offload
    progress.note(f"plan: offload {plan.offload}, peak {plan.peak_bytes / 2**30:.1f} GiB")
    return replace(request, max_batch_size=plan.max_batch_size), plan


class _Work:
    """The stages of one resolved request."""

    def __init__(self, pipeline: Pipeline, request: GenerationRequest) -> None:
        self.pipeline, self.request, self.models = pipeline, request, pipeline.models
        self.bytes = _weight_bytes(self.models)

    def stages(self, offload: str, max_batch_size: int | None) -> list[StagePlan]:
        request, models = self.request, self.models
        passes = _passes(request)
        steps = len(stages.schedule_of(request)) - 1
        draft = draft_of(models, request, steps, request.loras)
        contest = 0 if draft else early_step(steps) * (request.best_of - 1)
        calls = (steps + contest) * MODEL_CALLS.get(request.sampler or "euler", 1)
        has_stage_2 = self.pipeline.uses_stage_2(request)
        first = request.at_half_size() if has_stage_2 else request
        denoising = [("denoise", first.shape, calls, passes)]
        if draft:
            denoising.insert(0, ("draft", first.shape, request.best_of * draft.steps, 1))
        if has_stage_2:
            denoising.append(("refine", request.shape, len(request.stage_2_sigmas or ()), 1))
        networks = [("encode prompt", self._text_bytes(), Footprint(0, 0))]
        for name, shape, count, batch in denoising:
            at_once = batch if max_batch_size is None else min(batch, max_batch_size)
            cost = self._transformer(shape, at_once).times(count * batch / at_once)
            if offload in ("none", "model"):
                cost = cost._replace(peak_bytes=cost.peak_bytes + self._kept_text_bytes(batch))
            networks.append((name, self._transformer_bytes(offload), cost))
        if self.pipeline.name != "text-to-audio":
            networks.append(("decode video", self.bytes["video decoder"], self._video))
        if request.generate_audio:
            sound = self.bytes["audio decoder"] + self.bytes["vocoder"]
            networks.append(("decode audio", sound, self._audio))
        keeps_all = models.keeps_loaded and offload in ("none", "auto")
        found, held = [], 0.0
        for name, weights, cost in networks:
            if not keeps_all:
                held = weights
            elif name not in {again for again, *_ in denoising[1:]}:  # the transformer is there
                held += weights
            found.append(StagePlan(name, cost.flops, held, cost.peak_bytes))
        return found

    def _text_bytes(self) -> float:
        """Of the encoder's files and of the projector; nothing where the prompts are known."""
        known = [self.models.recall(encoding.text_identity(text), "text_encoder")
                 for text in encoding.prompts_of(self.request)]  # fmt: skip
        if all(found is not None for found in known):
            return 0.0
        source = self.models.text_encoder_source
        folder = Path(source) if source is not None else None
        files = folder.glob("*.safetensors") if folder is not None and folder.is_dir() else ()
        return sum(path.stat().st_size for path in files) + self.bytes["text"]

    @property
    def _text_length(self) -> int:
        return (self.models.checkpoint.config.get("text_encoder") or {}).get("max_length", 1024)

    def _kept_text_bytes(self, passes: int) -> float:
        """Keys and values of the text, where they are kept over the steps (`computed_once`)."""
        config = self.models.transformer_config
        if config.cross_attention_adaln:
            return 0.0
        width = config.width + (config.audio_width if self.request.generate_audio else 0)
        per_pass = 2 * config.num_layers * self._text_length * width * self.models.dtype.itemsize
        return passes * per_pass

    def _transformer_bytes(self, offload: str) -> float:
        if offload not in ("block", "disk"):
            return self.bytes["transformer"]
        blocks = self.models.transformer_config.num_layers
        return self.bytes["transformer"] - self.bytes["blocks"] * (1 - min(1.0, 2 / blocks))

    def _transformer(self, shape: VideoShape, batch: int) -> Footprint:
        """One call, from networks of one and two blocks: the others are like the second."""
        config = self.models.transformer_config
        one, two = (
            self._call(replace(config, num_layers=layers), shape, batch)
            for layers in (1, min(2, config.num_layers))
        )
        per_block = two.flops - one.flops
        flops = one.flops + per_block * (config.num_layers - 1)
        return Footprint(flops, max(one.peak_bytes, two.peak_bytes))

    def _call(self, config: Any, shape: VideoShape, batch: int) -> Footprint:
        models, dtype = self.models, self.models.dtype
        grids: dict[str, VideoGrid | AudioGrid] = {"video": stages.video_grid(models, shape)}
        if self.request.generate_audio:
            grids["audio"] = stages.audio_grid(models, shape)
        if self.pipeline.name == "text-to-audio":
            del grids["video"]
        length = self._text_length
        widths = {"video": config.caption_channels or config.width,
                  "audio": config.caption_channels or config.audio_width}  # fmt: skip
        with torch.device("meta"):
            network = Transformer(config).to(dtype)
            inputs = {
                name: Modality(
                    latent=torch.empty(batch, grid.num_tokens, _channels(config, name)),
                    sigma=torch.empty(batch),
                    timesteps=torch.empty(batch, 1, 1),
                    positions=torch.empty(1, 3 if name == "video" else 1, grid.num_tokens, 2),
                    context=torch.empty(batch, length, widths[name], dtype=dtype),
                )
                for name, grid in grids.items()
            }
        return footprint(lambda: network(inputs.get("video"), inputs.get("audio")))

    @cached_property
    def _video(self) -> Footprint:
        """All tiles of the picture, and the memory of one with its frames in bytes."""
        models, request = self.models, self.request
        config, scale, shape = (
            VideoVAEConfig.from_metadata(models.checkpoint.section("vae")),
            models.profile.scale,
            request.shape,
        )
        tiling = choose_tiling(
            request.tile,
            config,
            scale,
            (shape.num_frames, shape.height, shape.width),
            element_bytes=models.dtype.itemsize,
            free_bytes=models.free_memory(),
        )
        sizes = _tile_sizes(tiling, shape, scale.time)
        latent = shape._replace(
            num_frames=(sizes[0] - 1) // scale.time * scale.time + 1,
            height=sizes[1],
            width=sizes[2],
        ).latent(models.transformer_config.in_channels, scale)
        with torch.device("meta"):
            decoder = VideoDecoder(config).to(models.dtype)
            x = torch.empty(*latent, dtype=models.dtype)
        try:
            cost = footprint(lambda: decoder(x))
        except (NotImplementedError, RuntimeError):  # draws noise, which has no meta form
            cost = Footprint(0.0, decode_bytes(config, *sizes, models.dtype.itemsize))
        covered = math.prod(sizes)
        share = shape.num_frames * shape.height * shape.width / covered
        return Footprint(cost.flops * share, cost.peak_bytes + self._beside_decoding())

    def _beside_decoding(self) -> float:
        """What is held in main memory, beside the decoder, where that is a CPU's."""
        if self.models.device.type != "cpu":
            return 0.0
        shape, enlarge = self.request.shape, self.request.enlarge
        picture = 1.5 * shape.height * shape.width * enlarge**2
        frames = min(shape.num_frames, ENCODER_FRAMES)
        return CPU_SCRATCH_BYTES + ENCODER_PICTURES * frames * picture

    @cached_property
    def _audio(self) -> Footprint:
        models, checkpoint = self.models, self.models.checkpoint
        shape = stages.audio_grid(models, self.request.shape).shape
        with torch.device("meta"):
            decoder = AudioDecoder(models.audio_config).to(models.dtype)
            vocoder = Vocoder(VocoderConfig.from_metadata(checkpoint.section("vocoder")))
            x = torch.empty(*shape, dtype=models.dtype)
        return footprint(lambda: vocoder(decoder(x).float()))


def _channels(config: Any, modality: str) -> int:
    return config.in_channels if modality == "video" else config.audio_in_channels


def _passes(request: GenerationRequest) -> int:
    """Guidance passes of a step, by the same settings that `GuidedDenoiser` looks at."""
    modalities = ("video", "audio") if request.generate_audio else ("video",)
    guided = [stages.guidance_of(request, name) for name in modalities]
    return (
        1
        + any(g.cfg_scale != 1 for g in guided)
        + any(g.stg_scale != 0 for g in guided)
        + (len(guided) == 2 and any(g.modality_scale != 1 for g in guided))
    )


def _tile_sizes(tiling: Tiling, shape: VideoShape, time_scale: int) -> tuple[int, int, int]:
    """Frames, height and width that the decoder gets at once; a tile starts a latent earlier."""
    frames, height, width = (
        min(full, axis.size + extra) if isinstance(axis, BySize) else full
        for axis, full, extra in (
            (tiling.frames, shape.num_frames, time_scale),
            (tiling.height, shape.height, 0),
            (tiling.width, shape.width, 0),
        )
    )
    return frames, height, width


def _weight_bytes(models: ModelSet) -> dict[str, float]:
    """What each network holds once it is loaded, and the transformer's blocks alone."""
    parts: dict[str, KeyMap] = {
        "transformer": key_maps.TRANSFORMER,
        "text": key_maps.TEXT_PROJECTOR,
        "video decoder": key_maps.VIDEO_DECODER,
        "audio decoder": key_maps.AUDIO_DECODER,
        "vocoder": key_maps.VOCODER,
    }
    total = {"blocks": 0.0} | dict.fromkeys(parts, 0.0)
    for key, info in models.checkpoint.tensors.items():
        for part, key_map in parts.items():
            name = key_map.rename(key)
            if name is None:
                continue
            element = info.dtype.itemsize if info.dtype.itemsize == 1 else models.dtype.itemsize
            layer, _, leaf = name.rpartition(".")
            if part == "transformer" and leaf == "weight" and is_cast_target(layer):
                element = WEIGHT_BYTES.get(models.quantization or "", element)
            size = math.prod(info.shape) * element
            total[part] += size
            if part == "transformer" and name.startswith("transformer_blocks."):
                total["blocks"] += size
    return total


# What runs have shown.


class Observation(NamedTuple):
    flops: float
    seconds: float


@dataclass
class Rates:
    """Seconds that stages took on this machine in this precision, in a file beside the cache."""

    path: Path | None
    seen: dict[str, list[Observation]]
    _matmul_rate: float | None = None

    @classmethod
    def open(cls, models: ModelSet) -> "Rates":
        if models.cache is None:
            return cls(None, {})
        where = "-".join(recipe.circumstances(models.device, models.dtype).values())
        path = models.cache.folder / "rates" / f"{where.replace(' ', '_')}.json"
        try:
            seen = json.loads(path.read_text())
            return cls(path, {k: [Observation(*o) for o in v] for k, v in seen.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls(path, {})

    def seconds(self, stage: str, flops: float) -> float | None:
        """Between the nearest sizes seen of this stage, for a small clip is slower for its
        work; beyond them at the nearest one's rate. None where nothing says anything."""
        seen = self.seen.get(stage, [])
        if flops == 0:
            return statistics.median(o.seconds for o in seen) if seen else None
        took: dict[float, list[float]] = {}
        for o in seen:
            if o.flops > 0:
                took.setdefault(math.log(o.flops), []).append(math.log(max(o.seconds, 1e-6)))
        if not took:
            return flops / (FIRST_RATE * self._matmul())
        at = math.log(flops)
        below = max((size for size in took if size <= at), default=min(took))
        above = min((size for size in took if size >= at), default=max(took))
        lower, upper = statistics.median(took[below]), statistics.median(took[above])
        if below == above:
            return math.exp(lower + at - below)
        return math.exp(lower + (upper - lower) * (at - below) / (above - below))

    def add(self, stage: str, flops: float, seconds: float) -> None:
        self.seen[stage] = [*self.seen.get(stage, []), Observation(flops, seconds)][-RATES_KEPT:]

    def save(self) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump(self.seen, file)
            os.replace(file.name, self.path)

    def _matmul(self) -> float:
        """Operations a second of a product of 1024 x 1024, on this machine just now."""
        if self._matmul_rate is None:
            a = torch.randn(1024, 1024)
            torch.mm(a, a)
            started = time.perf_counter()
            for _ in range(3):
                torch.mm(a, a)
            self._matmul_rate = 3 * 2 * 1024**3 / (time.perf_counter() - started)
        return self._matmul_rate


def learn(plan: Plan, seconds: dict[str, float], models: ModelSet) -> None:
    """Keeps what each planned stage took (`Progress.seconds`), for the next plans."""
    rates = Rates.open(models)
    for stage in plan.stages:
        if stage.name in seconds:
            rates.add(stage.name, stage.flops, seconds[stage.name])
    rates.save()
