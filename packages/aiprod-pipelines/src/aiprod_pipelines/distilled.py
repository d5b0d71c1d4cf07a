"""The fast one: a distilled model, 8 fixed steps at half size and 3 at full size, no guidance.

from aiprod_pipelines.distilled import DistilledPipeline

pipeline = DistilledPipeline.from_model("nano")  # its distilled sibling
clip = pipeline("a red rubber ball bounces on a grey floor", seed=7)
clip.save("clip.mp4")

A model that is not distilled works with its distilled LoRA. The x2 upsampler lies beside the model;
without one, `skip_stage_2` makes the clip at full size in the 8 steps alone.
"""

from collections.abc import Iterator

import torch

from aiprod_pipelines import encoding, stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.stages import Latents


class DistilledPipeline(Pipeline):
    """The sound is that of the second stage, which the distilled model refines with the picture."""

    name = "distilled"
    has_stage_2 = True
    is_distilled = True

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        generators = stages.window_generators(models, request)
        loras = [*request.loras, *self.distillation(request)]
        contexts = encoding.encode_prompts(models, request, progress)
        given_audio = encoding.encode_given_audio(models, request, progress)

        # Stage 1, at half the height and width.
        small = request.at_half_size() if self.uses_stage_2(request) else request
        images = encoding.encode_images(models, small, small.images, progress)
        states = stages.initial_states(models, small, given_audio=given_audio)
        states = stages.add_images(states, images)
        stage_1 = stages.denoise(models, small, states, contexts, generators, progress, loras=loras)
        if not self.uses_stage_2(request):
            return stage_1

        # Stage 2, at full size, from the upsampled picture and the sound so far.
        images = encoding.encode_images(models, request, request.images, progress)
        states = stages.initial_states(models, request, given_audio=given_audio)
        states = stages.add_images(states, images)
        starts = stages.upsample(models, request, stage_1, progress)
        return stages.refine(
            models, request, states, starts, contexts, generators, progress, loras=loras
        )


if __name__ == "__main__":
    main(DistilledPipeline)
