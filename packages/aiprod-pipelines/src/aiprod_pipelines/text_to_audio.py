"""Sound alone: speech, music, ambience, from the audio half of the model.

from aiprod_pipelines.text_to_audio import TextToAudioPipeline

pipeline = TextToAudioPipeline.from_model("nano")
clip = pipeline("a rubber ball bounces on a hard floor", num_frames=49)
clip.save("ball.wav")

The length is num_frames / frame_rate seconds. The file may be .wav, .m4a, .flac or .mp4 without a
picture.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from aiprod_core.components import conditioning
from aiprod_core.errors import InputError
from aiprod_pipelines import encoding, stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import UNGUIDED, Pipeline, distilled_profile
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest, ModelProfile
from aiprod_pipelines.stages import Latents


class TextToAudioPipeline(Pipeline):
    """Guided by the negative prompt; there is no other modality to be guided by."""

    name = "text-to-audio"
    takes = frozenset[str]()

    @torch.inference_mode()
    def make(self, request: GenerationRequest, progress: Progress) -> Iterator[Latents]:
        models = self.models
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)

        grid = stages.audio_grid(models, request.shape)
        audio = conditioning.audio_state(grid, device=models.device)
        return stages.denoise(
            models,
            request,
            stages.States(audio=audio, audio_grid=grid),
            contexts,
            generators,
            progress,
            loras=request.loras,
        )

    def profile(self, request: GenerationRequest) -> ModelProfile:
        profile = super().profile(request)
        if self.models.is_distilled:
            profile = distilled_profile(profile, self.models)
        return replace(profile, modality_scale=UNGUIDED)

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        if not self.models.profile.has_audio:
            raise InputError(f"{self.models.name}: this model has no sound.")
        if not request.generate_audio:
            raise InputError("text-to-audio makes nothing but sound, so it cannot be silent.")
        return super().resolve(request)


if __name__ == "__main__":
    main(TextToAudioPipeline)
