"""Goes on where an existing clip ends, picture and sound.

from aiprod_pipelines.extend import ExtendPipeline

pipeline = ExtendPipeline.from_model("nano")
clip = pipeline("the ball rolls out of sight", source="clip.mp4", num_frames=49)
clip.save("longer.mp4")

`num_frames` counts the whole clip; by default a clip of the model's usual length is added. The
source is kept latent by latent. Its last frames that fill no latent are made anew.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from aiprod_core.components import conditioning
from aiprod_core.errors import InputError
from aiprod_core.types import AV
from aiprod_pipelines import encoding, stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline, distilled_profile
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest, ModelProfile
from aiprod_pipelines.stages import Latents


class ExtendPipeline(Pipeline):
    """One stage on the source's size: guided, or in 8 steps with a distilled model."""

    name = "extend"
    takes = frozenset({"camera"})
    needs = frozenset({"source"})

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)

        source = encoding.encode_source(models, request, progress)
        states = stages.initial_states(models, request)
        states = keep_beginning(states, source)
        return stages.denoise(
            models, request, states, contexts, generators, progress, loras=request.loras
        )

    def profile(self, request: GenerationRequest) -> ModelProfile:
        profile = super().profile(request)
        return distilled_profile(profile, self.models) if self.models.is_distilled else profile

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        if request.source is None:
            return super().resolve(request)  # which says that it is missing
        own = encoding.fitted_to_source(
            replace(request, num_frames=None), self.models.profile.scale
        )
        assert own.num_frames is not None
        added = self.models.profile.num_frames - 1
        num_frames = request.num_frames or own.num_frames + added
        if num_frames <= own.num_frames:
            raise InputError(
                f"num_frames counts the whole clip; {request.source} has {own.num_frames} already, "
                f"try {own.num_frames + added}."
            )
        return super().resolve(replace(own, num_frames=num_frames))


def keep_beginning(states: stages.States, source: AV) -> stages.States:
    video, audio = states.video, states.audio
    assert video is not None and states.video_grid is not None and source.video is not None
    video = conditioning.replace_frames(video, states.video_grid, source.video)
    if audio is not None and states.audio_grid is not None and source.audio is not None:
        audio = conditioning.replace_sound(audio, states.audio_grid, source.audio)
    return replace(states, video=video, audio=audio)


if __name__ == "__main__":
    main(ExtendPipeline)
