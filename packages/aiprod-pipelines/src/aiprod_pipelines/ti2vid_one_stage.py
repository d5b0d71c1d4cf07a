"""Text, or text and images, to a clip with sound at full size, in one guided pass.

from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

pipeline = TI2VidOneStagePipeline.from_model("nano")
clip = pipeline("a red rubber ball bounces on a grey floor", seed=7)
clip.save("clip.mp4")
"""

from typing import Any

import torch

from aiprod_core.components import schedulers
from aiprod_pipelines import stages
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest


class TI2VidOneStagePipeline:
    """Guided Euler steps on the LTX-2 schedule. Keeps its model between calls."""

    name = "one-stage"

    def __init__(self, models: ModelSet) -> None:
        self.models = models

    @classmethod
    def from_model(cls, model: str = "nano", **options: Any) -> "TI2VidOneStagePipeline":
        """Opens a model by name, reading headers only; `options` are those of `ModelSet.open`."""
        return cls(ModelSet.open(model, **options))

    def __call__(self, prompt: str, *, progress: Progress | None = None, **settings: Any) -> Clip:
        """Makes a clip; `settings` are the fields of GenerationRequest."""
        return self.run(GenerationRequest(prompt=prompt, **settings), progress=progress)

    @torch.inference_mode()
    def run(self, request: GenerationRequest, *, progress: Progress | None = None) -> Clip:
        """Makes the clip of a request. Raises InputError before any weight is read."""
        models, progress = self.models, progress or Progress()
        request = request.resolved(models.profile)
        modalities = ("video", "audio") if request.generate_audio else ("video",)
        guidance = {name: stages.guidance_of(request, name) for name in modalities}
        prompts = [request.prompt]
        if any(of_one.cfg_scale != 1 for of_one in guidance.values()):
            prompts.append(request.negative_prompt or "")

        contexts = stages.encode_prompts(models, prompts, progress)
        images = stages.encode_images(models, request, progress)
        states = stages.apply_images(stages.initial_states(models, request), images)
        latents = stages.denoise(
            models,
            states,
            schedulers.shifted(request.num_inference_steps or 1),
            contexts,
            guidance,
            torch.Generator().manual_seed(request.seed),
            progress,
        )
        return Clip(self.name, models, request, latents, progress)
