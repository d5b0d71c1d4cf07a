"""Makes a span of an existing clip anew: its picture, its sound, or both.

from aiprod_pipelines.retake import RetakePipeline

pipeline = RetakePipeline.from_model("nano")
clip = pipeline("the ball stops", source="clip.mp4", start_time=1.0, end_time=1.5)
clip.save("retake.mp4")

Size, rate and length are the source's unless the request says otherwise, brought to the model's
grid. What lies outside the span is kept latent by latent, so it is what the model's codec makes of
it; with modality "video" the clip carries the source's own sound.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from aiprod_core.components import conditioning
from aiprod_core.errors import InputError
from aiprod_pipelines import encoding, media, stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import Pipeline, distilled_profile
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest, ModelProfile
from aiprod_pipelines.stages import Latents


class RetakePipeline(Pipeline):
    """One stage on the source's size: guided, or in 8 steps with a distilled model."""

    name = "retake"
    takes = frozenset({"start_time", "end_time", "camera"})
    needs = frozenset({"source"})

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)

        source = encoding.encode_source(models, request, progress, is_whole=True)
        states = stages.initial_states(models, request, source)
        states = open_window(states, request)
        return stages.denoise(
            models, request, states, contexts, generators, progress, loras=request.loras
        )

    def soundtrack(self, request: GenerationRequest) -> media.Audio | None:
        if request.modality != "video" or not request.generate_audio:
            return None
        assert request.source is not None
        return media.read_span(request.source, 0.0, request.shape.duration_s)

    def profile(self, request: GenerationRequest) -> ModelProfile:
        profile = super().profile(request)
        return distilled_profile(profile, self.models) if self.models.is_distilled else profile

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        if request.source is not None:
            scale = self.models.profile.scale
            own = encoding.fitted_to_source(replace(request, num_frames=None), scale).num_frames
            assert own is not None
            if request.num_frames is not None and request.num_frames > own:
                raise InputError(
                    f"{request.source}: has {own} frames on the model's grid; num_frames "
                    f"{request.num_frames} is more, try {own}, or --pipeline extend."
                )
            request = encoding.fitted_to_source(request, scale)
        request = super().resolve(request)
        duration_s = request.shape.duration_s
        start_s = request.start_time or 0.0
        end_s = duration_s if request.end_time is None else request.end_time
        if start_s >= duration_s:
            raise InputError(
                f"start_time {start_s:g} s is after the end of the clip, which lasts "
                f"{duration_s:.2f} s; try 0."
            )
        if end_s <= start_s:
            raise InputError(
                f"end_time must be after start_time; got {start_s:g} to {end_s:g} s, "
                f"try {duration_s:.2f}."
            )
        if end_s > duration_s + 0.05:  # what a player shows is rounded
            raise InputError(
                f"end_time {end_s:g} s is after the end of the clip; try {duration_s:.2f}."
            )
        if request.modality != "video" and not request.generate_audio:
            raise InputError(
                f"there is no sound to retake with modality {request.modality}; try video."
            )
        return replace(request, start_time=start_s, end_time=end_s)


def open_window(states: stages.States, request: GenerationRequest) -> stages.States:
    """Tokens that overlap the span are generated; a modality that is not retaken is frozen."""
    assert request.start_time is not None and request.end_time is not None
    window = (request.start_time, request.end_time)
    video, audio = states.video, states.audio
    assert video is not None
    frozen = {"video": "audio", "audio": "video"}.get(request.modality)
    video = (
        conditioning.freeze(video)
        if frozen == "video"
        else conditioning.regenerate_window(video, *window)
    )
    if audio is not None:
        audio = (
            conditioning.freeze(audio)
            if frozen == "audio"
            else conditioning.regenerate_window(audio, *window)
        )
    names = {frozen} if frozen else set()
    return replace(states, video=video, audio=audio, frozen=frozenset(names))


if __name__ == "__main__":
    main(RetakePipeline)
