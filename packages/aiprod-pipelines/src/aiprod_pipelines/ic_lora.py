"""Follows a reference through an IC-LoRA: video to video, or image to video.

from aiprod_pipelines.ic_lora import ICLoraPipeline

pipeline = ICLoraPipeline.from_model("ltx-2-19b-distilled.safetensors")
clip = pipeline("a bronze dancer on a beach", controls=[("canny", "dance.mp4")])
clip.save("clip.mp4")

The LoRA of a control is found beside the model by its published name, or given in `loras`, which
then replaces those found. A reference that is longer than the clip is cut; a shorter one steers the
beginning; its frames are scaled to cover the picture, and cropped.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from aiprod_core.components import conditioning
from aiprod_core.errors import InputError
from aiprod_pipelines import companions, encoding, media, stages
from aiprod_pipelines.controls import make_control
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import (
    MADE_CONTROLS,
    ControlCondition,
    GenerationRequest,
    ModelProfile,
)
from aiprod_pipelines.stages import Latents


class ICLoraPipeline(Pipeline):
    """Distilled, in two stages; the second knows neither the LoRA nor the references."""

    name = "ic-lora"
    needs = frozenset({"controls"})
    has_stage_2 = True
    is_distilled = True

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)
        given_audio = encoding.encode_given_audio(models, request, progress)

        # Stage 1, at half the height and width, with the references beside the clip.
        small = request.at_half_size() if self.uses_stage_2(request) else request
        images = encoding.encode_images(models, small, small.images, progress)
        states = stages.initial_states(models, small, given_audio=given_audio)
        states = stages.add_images(states, images)
        states = self.add_references(small, states, progress)
        loras = [*request.loras, *self.distillation(request)]
        stage_1 = stages.denoise(models, small, states, contexts, generators, progress, loras=loras)
        if not self.uses_stage_2(request):
            return stage_1

        # Stage 2, at full size, as the distilled pipeline's.
        images = encoding.encode_images(models, request, request.images, progress)
        states = stages.initial_states(models, request, given_audio=given_audio)
        states = stages.add_images(states, images)
        loras = self.distillation(request)
        starts = stages.upsample(models, request, stage_1, progress)
        return stages.refine(
            models, request, states, starts, contexts, generators, progress, loras=loras
        )

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        if request.controls and not request.loras:
            kinds = dict.fromkeys(control.kind for control in request.controls)
            found = [companions.ic_lora(self.models.checkpoint, kind) for kind in kinds]
            request = replace(request, loras=tuple(found))
        return super().resolve(request)

    def profile(self, request: GenerationRequest) -> ModelProfile:
        """References that are smaller than the clip by a factor must lie on the grid too."""
        profile = super().profile(request)
        downscale, _ = self.reference_factors(request)
        scale = profile.scale
        height, width = scale.height * downscale, scale.width * downscale
        return replace(profile, scale=scale._replace(height=height, width=width))

    def reference_factors(self, request: GenerationRequest) -> tuple[int, int]:
        """At which fraction of the clip's size and rate the LoRAs expect their reference."""
        loras = [companions.check_lora(self.models.checkpoint, file) for file in request.loras]
        downscale = {lora.reference_downscale_factor for lora in loras} - {1} or {1}
        temporal = {lora.reference_temporal_scale_factor for lora in loras} - {1} or {1}
        if len(downscale) > 1 or len(temporal) > 1:
            raise InputError(
                "these IC-LoRAs expect references of different sizes or rates; give one of them."
            )
        return downscale.pop(), temporal.pop()

    def add_references(
        self, request: GenerationRequest, states: stages.States, progress: Progress
    ) -> stages.States:
        video, grid = states.video, states.video_grid
        assert video is not None and grid is not None
        downscale, temporal_scale = self.reference_factors(request)
        for control in request.controls:
            video = conditioning.append_reference_video(
                video,
                grid,
                self.encode_reference(request, control, downscale, temporal_scale, progress),
                strength=control.strength,
                downscale=downscale,
                temporal_scale=temporal_scale,
            )
        return replace(states, video=video)

    def encode_reference(
        self,
        request: GenerationRequest,
        control: ControlCondition,
        downscale: int,
        temporal_scale: int,
        progress: Progress,
    ) -> Tensor:
        """A control's signal as a latent (1, C, f, h, w)."""
        time = self.models.profile.scale.time
        frames = encoding.read_clip(control.path, request, scale_time=time * temporal_scale)
        num_frames = request.shape.num_frames
        is_video = (media.probe(control.path).num_frames or 1) > 1  # an image steers the first
        if is_video and len(frames) < num_frames:
            progress.note(f"{control.path}: steers the first {len(frames)} of {num_frames} frames")
        if control.kind in MADE_CONTROLS:
            with progress.stage(f"make {control.kind}"):
                frames = make_control(control.kind, frames)
        if temporal_scale > 1:
            frames = frames[[0, *range(1, len(frames), temporal_scale)]]
        height, width = request.shape.height // downscale, request.shape.width // downscale
        small = [media.prepare_frame(frame, height, width) for frame in frames]
        return encoding.encode_frames(self.models, np.stack(small), progress)


if __name__ == "__main__":
    main(ICLoraPipeline)
