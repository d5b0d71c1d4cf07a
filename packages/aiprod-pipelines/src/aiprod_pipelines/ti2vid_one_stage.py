"""Text, or text and images, to a clip with sound at full size, in one guided pass.

from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

pipeline = TI2VidOneStagePipeline.from_model("nano")
clip = pipeline("a red rubber ball bounces on a grey floor", seed=7)
clip.save("clip.mp4")
"""

from collections.abc import Iterator

import torch

from aiprod_pipelines import encoding, stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.stages import Latents


class TI2VidOneStagePipeline(Pipeline):
    """Guided steps on the LTX-2 schedule, by Euler unless the request says otherwise."""

    name = "one-stage"

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)

        given_audio = encoding.encode_given_audio(models, request, progress)
        images = encoding.encode_images(models, request, request.images, progress)
        states = stages.initial_states(models, request, given_audio=given_audio)
        states = stages.add_images(states, images)
        return stages.denoise(
            models, request, states, contexts, generators, progress, loras=request.loras
        )


if __name__ == "__main__":
    main(TI2VidOneStagePipeline)
