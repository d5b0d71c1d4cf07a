"""What all pipelines share: how they are opened and called, and what they check beforehand."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from aiprod_core.errors import InputError
from aiprod_pipelines import analytics, companions, media
from aiprod_pipelines.best_of import check_best_of
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.model_files import count_parameters
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest, LoraFile, ModelProfile, PerModality
from aiprod_pipelines.stages import Latents
from aiprod_pipelines.tiles import choose_refine_tile

UNGUIDED = PerModality(1.0, 1.0)
NONE = PerModality(0.0, 0.0)

# Inputs that only some pipelines use: the field, its flag, and the pipeline that takes it.
OPTIONAL_INPUTS = {
    "images": ("--image", "one-stage"),
    "keyframes": ("--keyframe", "keyframes"),
    "controls": ("--control", "ic-lora"),
    "source": ("--source", "retake or extend"),
    "start_time": ("--start-time", "retake"),
    "end_time": ("--end-time", "retake"),
    "audio": ("--audio", "audio-to-video"),
    "camera": ("--camera", "one-stage"),
}


class Pipeline(ABC):
    """One way from a request to a clip. Keeps its model between calls.

    Subclasses say by class attributes what they take and need, and write `make`.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset({"images", "audio", "camera"})  # of OPTIONAL_INPUTS
    needs: ClassVar[frozenset[str]] = frozenset()  # those without which it makes no sense
    has_stage_2: ClassVar[bool] = False
    is_distilled: ClassVar[bool] = False  # the first stage too runs without guidance

    def __init__(self, models: ModelSet) -> None:
        self.models = models

    @classmethod
    def from_model(cls, model: str = "nano", **options: Any) -> Self:
        """Opens a model by name, reading headers only; `options` are those of `ModelSet.open`."""
        return cls(ModelSet.open(model, prefers_distilled=cls.is_distilled, **options))

    def __call__(self, prompt: str, *, progress: Progress | None = None, **settings: Any) -> Clip:
        """Makes a clip; `settings` are the fields of GenerationRequest."""
        with analytics.run("call"):
            return self.run(GenerationRequest(prompt=prompt, **settings), progress=progress)

    def stream(
        self, prompt: str, *, progress: Progress | None = None, **settings: Any
    ) -> Iterator[bytes]:
        """Makes a clip and yields it as segments of one MP4, the first while the rest is latents.

        Arguments are those of a call. Requests are checked on the first segment, and with
        `window_frames` no more is denoised for it than the first window.
        """
        with analytics.run("call"):
            request = GenerationRequest(prompt=prompt, **settings)
            yield from self.run(request, progress=progress, is_streamed=True).stream()

    def run(
        self,
        request: GenerationRequest,
        *,
        progress: Progress | None = None,
        is_streamed: bool = False,
    ) -> Clip:
        """Makes the clip of a request. Raises InputError before any weight is read.

        With `is_streamed` only its first window is made; the clip's stream makes the others.
        """
        progress = progress or Progress()
        request = self.resolve(request)
        windows = self.make(request, progress)
        first = next(windows)
        request = replace(request, seed=first.seed, best_of=1)
        clip = Clip(self.name, self.models, request, first.clip, progress, self.soundtrack(request))
        clip.expect(windows, first.final)
        if not is_streamed or request.heal or not self.models.stays_loaded:
            clip.finish()
        if request.heal:
            from aiprod_pipelines.heal import heal

            clip = heal(self, clip)
        return clip

    @abstractmethod
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        """The recipe, for a resolved request: the clip's latents, a window more each time."""

    def profile(self, request: GenerationRequest) -> ModelProfile:
        """The grid and the defaults of a request to this pipeline."""
        profile = self.models.profile
        if self.is_distilled:
            profile = distilled_profile(profile, self.models)
        if self.uses_stage_2(request):
            # The first stage has half the size and must lie on the grid too.
            scale = profile.scale
            profile = replace(
                profile,
                height=profile.height * 2,
                width=profile.width * 2,
                scale=scale._replace(height=scale.height * 2, width=scale.width * 2),
            )
        return profile

    def uses_stage_2(self, request: GenerationRequest) -> bool:
        return self.has_stage_2 and not request.skip_stage_2

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """The request with every default and every file filled in, all of it checked."""
        self._check_inputs(request)
        checkpoint = self.models.checkpoint
        request = request.resolved(self.profile(request))
        if self.uses_stage_2(request):
            path = companions.spatial_upsampler(checkpoint, request.spatial_upsampler)
            tile = self.refine_tile(request)
            request = replace(request, spatial_upsampler=path, refine_tile=tile)
        if self.is_distilled or self.uses_stage_2(request):
            lora = None
            if not self.models.is_distilled:
                lora = companions.distilled_lora(checkpoint, request.distilled_lora)
            request = replace(request, distilled_lora=lora)
        if request.decoder == "tiny":
            companions.tiny_decoder(checkpoint)
        if request.camera is not None:
            found = companions.camera_lora(checkpoint, request.camera)
            # A recipe's request has it already, perhaps from where the clip was made.
            if found.path.name not in {lora.path.name for lora in request.loras}:
                request = replace(request, loras=(*request.loras, found))
        for lora in (*request.loras, *self.distillation(request)):
            companions.check_lora(checkpoint, lora)
        self.models.check_adapters([*request.loras, *self.distillation(request)])
        check_best_of(self.models, request)
        analytics.note(**self._facts(request))
        return request

    def _facts(self, request: GenerationRequest) -> dict[str, analytics.Fact]:
        """What is recorded of a request: nothing that a user wrote, no path."""
        models = self.models
        return {
            "pipeline": self.name,
            "model": Path(models.name).name,
            "device": models.device.type,
            "dtype": str(models.dtype).removeprefix("torch."),
            "offload": models.offload,
            "quantization": models.quantization,
            "width": request.width,
            "height": request.height,
            "num_frames": request.num_frames,
            "steps": request.num_inference_steps,
            "sampler": request.sampler or "euler",
        }

    def refine_tile(self, request: GenerationRequest) -> str:
        """What of the picture the second stage sees at once, chosen now for the recipe's sake."""
        models, shape = self.models, request.shape
        weights = count_parameters(models.checkpoint)["transformer"] * models.dtype.itemsize
        free = models.free_memory()
        return choose_refine_tile(
            request.refine_tile,
            models.transformer_config.width,
            models.profile.scale,
            (request.window_frames or shape.num_frames, shape.height, shape.width),
            element_bytes=models.dtype.itemsize,
            # Weights that would leave less than a quarter are not all in memory at once.
            free_bytes=max(free - weights, free // 4),
        )

    def distillation(self, request: GenerationRequest) -> list[LoraFile]:
        """What is added for steps without guidance; nothing when the model is distilled itself."""
        return [request.distilled_lora] if request.distilled_lora else []

    def soundtrack(self, request: GenerationRequest) -> media.Audio | None:
        """A sound that was given and comes back as it was, in place of the latents' own."""
        if request.audio is None:
            return None
        return media.read_span(request.audio, request.audio_start_time, request.shape.duration_s)

    def _check_inputs(self, request: GenerationRequest) -> None:
        for field, (flag, other) in OPTIONAL_INPUTS.items():
            given = getattr(request, field) not in (None, ())
            if given and field not in self.takes | self.needs:
                raise InputError(f"{self.name} does not use {flag}; try --pipeline {other}.")
            if field in self.needs and not given:
                raise InputError(f"{self.name} needs {flag}.")
        # A retake would forget a control or a source, and needs a picture.
        if request.heal and (request.controls or request.source or self.name == "text-to-audio"):
            raise InputError(f"{self.name} cannot heal its clips; leave out --heal.")


def distilled_profile(profile: ModelProfile, models: ModelSet) -> ModelProfile:
    """Fixed levels and no guidance. From 2.5 on, distilled models are sampled with fresh noise."""
    return replace(
        profile,
        num_inference_steps=8,
        schedule="distilled",
        sampler="euler-ancestral" if models.checkpoint.version >= (2, 5) else "euler",
        cfg_scale=UNGUIDED,
        stg_scale=NONE,
        rescale_scale=NONE,
        modality_scale=UNGUIDED,
    )
