"""Two stages with the second-order sampler res-2s: fewer, dearer steps, the finest detail.

from aiprod_pipelines.ti2vid_two_stages_hq import TI2VidTwoStagesHQPipeline

pipeline = TI2VidTwoStagesHQPipeline.from_model("ltx-2-19b-dev.safetensors")
clip = pipeline("a red rubber ball bounces on a grey floor", width=1920, height=1088)
clip.save("clip.mp4")

What differs from the two-stage pipeline: the sampler, its 15 steps, a schedule shifted for the
clip's real number of tokens, milder guidance, and the distilled LoRA in both stages in part.
"""

from dataclasses import replace

import torch

from aiprod_pipelines import stages
from aiprod_pipelines.flags import main
from aiprod_pipelines.pipeline import NONE
from aiprod_pipelines.request import GenerationRequest, LoraFile, ModelProfile, PerModality
from aiprod_pipelines.ti2vid_two_stages import TI2VidTwoStagesPipeline

# Of the distilled LoRA's own strength.
SHARE_IN_STAGE_1 = 0.25
SHARE_IN_STAGE_2 = 0.5


class TI2VidTwoStagesHQPipeline(TI2VidTwoStagesPipeline):
    """As published for LTX-2's HQ recipe."""

    name = "two-stages-hq"
    sampler_of_stage_2 = "res-2s"

    def profile(self, request: GenerationRequest) -> ModelProfile:
        return replace(
            super().profile(request),
            num_inference_steps=15,
            sampler="res-2s",
            stg_scale=NONE,
            rescale_scale=PerModality(0.45, 1.0),
        )

    def sigmas(self, request: GenerationRequest, states: stages.States) -> torch.Tensor:
        assert states.video_grid is not None
        return stages.schedule_of(request, num_tokens=states.video_grid.num_tokens)

    def loras_of_stage_1(self, request: GenerationRequest) -> list[LoraFile]:
        return [*request.loras, *_in_part(self.distillation(request), SHARE_IN_STAGE_1)]

    def loras_of_stage_2(self, request: GenerationRequest) -> list[LoraFile]:
        return [*request.loras, *_in_part(self.distillation(request), SHARE_IN_STAGE_2)]


def _in_part(loras: list[LoraFile], share: float) -> list[LoraFile]:
    return [replace(lora, strength=lora.strength * share) for lora in loras]


if __name__ == "__main__":
    main(TI2VidTwoStagesHQPipeline)
