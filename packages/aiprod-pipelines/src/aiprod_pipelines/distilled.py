"""The fast one: a distilled model, 8 fixed steps at half size and 3 at full size, no guidance.

from aiprod_pipelines.distilled import DistilledPipeline

pipeline = DistilledPipeline.from_model("nano")  # its distilled sibling
clip = pipeline("a red rubber ball bounces on a grey floor", seed=7)
clip.save("clip.mp4")

A model that is not distilled works with its distilled LoRA. The x2 upsampler lies beside the model;
without one, `skip_stage_2` makes the clip at full size in the 8 steps alone.
"""

import torch

from aiprod_pipelines import stages
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest


class DistilledPipeline(Pipeline):
    """The sound is that of the second stage, which the distilled model refines with the picture."""

    name = "distilled"
    has_stage_2 = True
    is_distilled = True

    @torch.inference_mode()
    def run(self, request: GenerationRequest, *, progress: Progress | None = None) -> Clip:
        models, progress = self.models, progress or Progress()
        request = self.resolve(request)
        generator = torch.Generator().manual_seed(request.seed)
        loras = [*request.loras, *self.distillation(request)]
        contexts = stages.encode_prompts(models, request, progress)
        given_audio = stages.encode_given_audio(models, request, progress)

        # Stage 1, at half the height and width.
        small = request.at_half_size() if self.uses_stage_2(request) else request
        images = stages.encode_images(models, small, small.images, progress)
        states = stages.initial_states(models, small, given_audio=given_audio)
        states = stages.add_images(states, images)
        latents = stages.denoise(models, small, states, contexts, generator, progress, loras=loras)
        if not self.uses_stage_2(request):
            return self.clip(request, latents, progress)

        # Stage 2, at full size, from the upsampled picture and the sound so far.
        upsampled = stages.upsample(models, request, latents, progress)
        images = stages.encode_images(models, request, request.images, progress)
        states = stages.initial_states(models, request, upsampled, given_audio=given_audio)
        states = stages.add_images(states, images)
        latents = stages.refine(models, request, states, contexts, generator, progress, loras=loras)
        return self.clip(request, latents, progress)


if __name__ == "__main__":
    main(DistilledPipeline)
