"""A clip that passes through any number of images at given frames.

from aiprod_pipelines.keyframe_interpolation import KeyframeInterpolationPipeline

pipeline = KeyframeInterpolationPipeline.from_model("ltx-2-19b-dev.safetensors")
clip = pipeline("the ball rolls away", keyframes=[("first.png", 0), ("last.png", 120, 0.9)])
clip.save("clip.mp4")

Unlike a first image, a keyframe is shown beside the clip: it says how the clip looks at that time
without taking the place of a latent, so any frame may have one.
"""

import torch

from aiprod_pipelines import stages
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest


class KeyframeInterpolationPipeline(Pipeline):
    """Two stages; `images` count as keyframes too. The sound is that of the second stage."""

    name = "keyframes"
    takes = frozenset({"images", "audio", "camera", "keyframes"})
    has_stage_2 = True

    @torch.inference_mode()
    def run(self, request: GenerationRequest, *, progress: Progress | None = None) -> Clip:
        models, progress = self.models, progress or Progress()
        request = self.resolve(request)
        keyframes = [*request.images, *request.keyframes]
        generator = torch.Generator().manual_seed(request.seed)
        contexts = stages.encode_prompts(models, request, progress)
        given_audio = stages.encode_given_audio(models, request, progress)

        # Stage 1, at half the height and width.
        small = request.at_half_size() if self.uses_stage_2(request) else request
        images = stages.encode_images(models, small, keyframes, progress)
        states = stages.initial_states(models, small, given_audio=given_audio)
        states = stages.add_keyframes(states, images)
        latents = stages.denoise(
            models, small, states, contexts, generator, progress, loras=request.loras
        )
        if not self.uses_stage_2(request):
            return self.clip(request, latents, progress)

        # Stage 2, at full size, with the keyframes again.
        upsampled = stages.upsample(models, request, latents, progress)
        images = stages.encode_images(models, request, keyframes, progress)
        states = stages.initial_states(models, request, upsampled, given_audio=given_audio)
        states = stages.add_keyframes(states, images)
        loras = [*request.loras, *self.distillation(request)]
        latents = stages.refine(models, request, states, contexts, generator, progress, loras=loras)
        return self.clip(request, latents, progress)


if __name__ == "__main__":
    main(KeyframeInterpolationPipeline)
