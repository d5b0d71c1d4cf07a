"""Text, or text and images, to a large clip with sound: guided at half size, refined at full size.

from aiprod_pipelines.ti2vid_two_stages import TI2VidTwoStagesPipeline

pipeline = TI2VidTwoStagesPipeline.from_model("ltx-2-19b-dev.safetensors")
clip = pipeline("a red rubber ball bounces on a grey floor", width=1536, height=1024)
clip.save("clip.mp4")

Beside the model lie its x2 upsampler and its distilled LoRA; see companions.py.
"""

from collections.abc import Iterator
from itertools import tee
from typing import ClassVar

import torch

from aiprod_pipelines import encoding, stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest, LoraFile
from aiprod_pipelines.stages import Latents


class TI2VidTwoStagesPipeline(Pipeline):
    """The sound is that of the first stage: the second hears it, but its own is not kept."""

    name = "two-stages"
    has_stage_2 = True
    sampler_of_stage_2: ClassVar[str] = "euler"

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)
        given_audio = encoding.encode_given_audio(models, request, progress)

        # Stage 1, at half the height and width.
        small = request.at_half_size() if self.uses_stage_2(request) else request
        images = encoding.encode_images(models, small, small.images, progress)
        states = stages.initial_states(models, small, given_audio=given_audio)
        states = stages.add_images(states, images)
        stage_1 = stages.denoise(
            models,
            small,
            states,
            contexts,
            generators,
            progress,
            sigmas=self.sigmas(small, states),
            loras=self.loras_of_stage_1(request),
        )
        if not self.uses_stage_2(request):
            return stage_1

        # Stage 2, at full size, from the upsampled picture. Images are encoded anew: at this size.
        images = encoding.encode_images(models, request, request.images, progress)
        states = stages.initial_states(models, request, given_audio=given_audio)
        states = stages.add_images(states, images)
        stage_1, sounds = tee(stage_1)
        stage_2 = stages.refine(
            models,
            request,
            states,
            stages.upsample(models, request, stage_1, progress),
            contexts,
            generators,
            progress,
            loras=self.loras_of_stage_2(request),
            sampler=self.sampler_of_stage_2,
        )
        return stages.with_sound_of(sounds, stage_2)

    def sigmas(self, request: GenerationRequest, states: stages.States) -> torch.Tensor:
        """Of the first stage. Published models shift for 4096 tokens, whatever the size."""
        return stages.schedule_of(request)

    def loras_of_stage_1(self, request: GenerationRequest) -> list[LoraFile]:
        return list(request.loras)

    def loras_of_stage_2(self, request: GenerationRequest) -> list[LoraFile]:
        return [*request.loras, *self.distillation(request)]


if __name__ == "__main__":
    main(TI2VidTwoStagesPipeline)
