"""A clip that passes through any number of images at given frames.

from aiprod_pipelines.keyframe_interpolation import KeyframeInterpolationPipeline

pipeline = KeyframeInterpolationPipeline.from_model("ltx-2-19b-dev.safetensors")
clip = pipeline("the ball rolls away", keyframes=[("first.png", 0), ("last.png", 120, 0.9)])
clip.save("clip.mp4")

Unlike a first image, a keyframe is shown beside the clip: it says how the clip looks at that time
without taking the place of a latent, so any frame may have one.
"""

from collections.abc import Iterator

import torch

from aiprod_pipelines import encoding, stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.stages import Latents


class KeyframeInterpolationPipeline(Pipeline):
    """Two stages; `images` count as keyframes too. The sound is that of the second stage."""

    name = "keyframes"
    takes = frozenset({"images", "audio", "camera", "keyframes"})
    has_stage_2 = True

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        keyframes = [*request.images, *request.keyframes]
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)
        given_audio = encoding.encode_given_audio(models, request, progress)

        # Stage 1, at half the height and width.
        small = request.at_half_size() if self.uses_stage_2(request) else request
        images = encoding.encode_images(models, small, keyframes, progress)
        states = stages.initial_states(models, small, given_audio=given_audio)
        states = stages.add_keyframes(states, images)
        stage_1 = stages.denoise(
            models, small, states, contexts, generators, progress, loras=request.loras
        )
        if not self.uses_stage_2(request):
            return stage_1

        # Stage 2, at full size, with the keyframes again.
        images = encoding.encode_images(models, request, keyframes, progress)
        states = stages.initial_states(models, request, given_audio=given_audio)
        states = stages.add_keyframes(states, images)
        loras = [*request.loras, *self.distillation(request)]
        starts = stages.upsample(models, request, stage_1, progress)
        return stages.refine(
            models, request, states, starts, contexts, generators, progress, loras=loras
        )


if __name__ == "__main__":
    main(KeyframeInterpolationPipeline)
