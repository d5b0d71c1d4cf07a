"""Out of memory in the middle of a run: the run goes on, smaller, to the same result."""

from dataclasses import replace

import pytest
import torch

from aiprod_core.components.denoising import denoise
from aiprod_core.components.guiders import Guidance, GuidedDenoiser, GuidedModality
from aiprod_core.errors import is_out_of_memory
from aiprod_core.types import LatentState

SIGMAS = torch.linspace(1, 0, 5)


def guided() -> GuidedModality:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 6, 4, generator=generator)
    start = torch.rand(1, 1, 6, 1, generator=generator)
    state = LatentState(tokens, tokens, torch.ones(1, 6, 1), torch.cat((start, start + 1), -1))
    context = torch.randn(1, 3, 4, generator=generator)
    return GuidedModality(state, context, -context, Guidance(cfg_scale=3.0))


class Model:
    """Pulls tokens towards the mean of the text; has room for `room` samples at once."""

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.batches: list[int] = []

    def __call__(self, video, audio, perturbations=None):
        batch = len(video.latent)
        if batch > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.batches.append(batch)
        text = video.context.mean(1, keepdim=True)
        return torch.tanh(video.latent - text) * (1 + video.sigma[:, None, None]), None


def run(model: Model, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    video = denoise(model, SIGMAS, guided(), None, generator=generator, **options).video
    assert video is not None
    return video


def one_at_a_time(denoiser: GuidedDenoiser) -> bool:
    if denoiser.max_batch_size == 1:
        return False
    denoiser.max_batch_size = 1
    return True


def test_a_call_that_is_too_large_is_made_again_in_parts_with_the_same_result():
    model = Model()
    expected = run(model)
    assert model.batches == [2] * 4

    class Shrinking(Model):
        def __call__(self, *inputs):
            if len(self.batches) == 2:  # someone else takes the memory
                self.room = 1
            return super().__call__(*inputs)

    shrinking = Shrinking()
    torch.testing.assert_close(run(shrinking, lighten=one_at_a_time), expected)
    assert shrinking.batches == [2, 2, 1, 1, 1, 1]  # nothing is computed twice


def test_an_error_that_nothing_mends_comes_through():
    with pytest.raises(RuntimeError, match="out of memory"):
        run(Model(room=0), lighten=one_at_a_time)


def test_another_error_is_not_taken_for_memory():
    asked: list[bool] = []

    def broken(*inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        denoise(broken, SIGMAS, guided(), None, lighten=lambda d: asked.append(True) or True)
    assert asked == []


def test_every_kind_of_memory_error_is_known():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] CPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("index out of range"))


def test_a_pass_that_agrees_is_left_out_from_the_next_step_on():
    model = Model()
    run(model, min_cosine=-1.0)  # any two agree
    assert model.batches == [2, 1, 1, 1]
    model.batches.clear()
    run(model, min_cosine=1.0)
    assert model.batches == [2] * 4


def test_the_pass_stays_until_it_agrees_in_the_measured_cosine():
    class Converging(Model):
        """Both prompts say the same from the third call on."""

        def __call__(self, video, audio, perturbations=None):
            if len(self.batches) >= 2:
                context = video.context[:1].expand_as(video.context)
                video = replace(video, context=context)
            return super().__call__(video, audio, perturbations)

    model = Converging()
    run(model, min_cosine=0.999)
    assert model.batches == [2, 2, 2, 1]
