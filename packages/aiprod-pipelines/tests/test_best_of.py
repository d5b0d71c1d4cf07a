"""Several seeds, one clip: who wins, what it costs, and that the winner is the seed's own clip."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import save_checkpoint
from aiprod_core.model.reward import RewardConfig, RewardModel, init_reward
from aiprod_core.types import AV
from aiprod_pipelines.best_of import Verdict, contest, draft_of, early_step
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.plan import make_plan
from aiprod_pipelines.replay import open_replay
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.reward import score_file
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

PROMPT = "a red ball bounces with a loud sound"


def save_tiny_reward(path: Path) -> None:
    config = RewardConfig(
        video_channels=8, audio_channels=32, text_width=8, width=24, heads=2, sync_width=8
    )
    model = RewardModel(config)
    init_reward(model, torch.Generator().manual_seed(3))
    save_checkpoint(path, [(key_maps.REWARD, model)], {"config": {"reward": config.to_metadata()}})


@pytest.fixture(scope="module")
def judged_family(tiny_family: Path) -> Path:
    save_tiny_reward(tiny_family / "tiny-reward.safetensors")
    return tiny_family


def attempt_of(values: dict[int, float], taken: list[int], steps: int) -> Callable[..., AV]:
    """A sampler whose estimate is a constant of the seed, and which writes down its steps."""

    def attempt(seed: int, callback) -> AV:
        x = AV(torch.tensor(values[seed]))
        for step in range(steps):
            taken.append(seed)
            callback(step, 1 - step / steps, x, x)
        return x

    return attempt


@pytest.mark.parametrize("scores", [(3, 1, 2), (1, 3, 2), (1, 2, 3), (2, 2, 1)])
def test_the_best_seed_is_finished_and_the_others_stop_early(scores):
    values = dict(zip((10, 11, 12), map(float, scores), strict=True))
    taken: list[int] = []
    x, seed, found = contest(
        attempt_of(values, taken, 10), list(values), 10, lambda x, sigma: float(x.video)
    )
    assert seed == 10 + scores.index(max(scores))
    assert float(x.video) == max(scores) and found == list(values.values())
    expected = {s: 10 if s == seed else early_step(10) for s in values}
    assert {s: taken.count(s) for s in values} == expected


def test_four_seeds_cost_at_most_twice_a_clip():
    for steps in (4, 8, 20, 30, 40):
        assert (steps + 3 * early_step(steps)) / steps <= 1.9


@pytest.mark.parametrize(
    ("pipeline", "settings"),
    [
        ("one-stage", {}),
        ("one-stage", {"sampler": "dpmpp-2m-sde", "num_inference_steps": 5}),
        ("two-stages", {"sampler": "euler-ancestral"}),
        ("distilled", {}),
    ],
)
def test_the_clip_is_bit_for_bit_that_of_the_chosen_seed(judged_family, pipeline, settings):
    model = "tiny-distilled" if pipeline == "distilled" else "tiny-dev"
    opened = find_pipeline(pipeline).from_model(str(judged_family / f"{model}.safetensors"))
    best = opened(PROMPT, seed=4, best_of=3, **settings)
    request = best.recipe["request"]
    assert request["seed"] in (4, 5, 6) and request["best_of"] == 1
    alone = opened(PROMPT, seed=request["seed"], **settings)
    assert best.recipe["latents_sha256"] == alone.recipe["latents_sha256"]


def test_the_model_is_called_as_often_as_promised(judged_family):
    opened = TI2VidOneStagePipeline.from_model(str(judged_family / "tiny-dev.safetensors"))
    calls: list[int] = []
    with opened.models.transformer() as transformer:
        handle = transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        opened(PROMPT, num_inference_steps=10, best_of=4)
        handle.remove()
    assert len(calls) == 10 + 3 * 3


def test_drafts_are_judged_finished_and_the_best_is_made_whole(judged_family, monkeypatch):
    opened = TI2VidOneStagePipeline.from_model(str(judged_family / "tiny-dev.safetensors"))
    judged: list[float] = []

    def total(self, latents, sigma, video_grid, audio_grid) -> float:
        judged.append(sigma)
        return (1.0, 3.0, 2.0, 0.0)[len(judged) - 1]

    monkeypatch.setattr(Verdict, "total", total)
    calls: list[int] = []
    with opened.models.transformer() as transformer:
        handle = transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        best = opened(PROMPT, seed=4, num_inference_steps=20, best_of=4)
        handle.remove()
    assert judged == [0.0] * 4 and len(calls) == 20 + 4 * 4
    assert best.recipe["request"]["seed"] == 5
    alone = opened(PROMPT, seed=5, num_inference_steps=20)
    assert best.recipe["latents_sha256"] == alone.recipe["latents_sha256"]


@pytest.mark.parametrize(("steps", "few"), [(17, None), (18, 4), (35, 4), (36, 8), (40, 8)])
def test_drafts_are_made_where_four_cost_no_more_than_early_steps(judged_family, steps, few):
    opened = TI2VidOneStagePipeline.from_model(str(judged_family / "tiny-dev.safetensors"))
    request = opened.resolve(GenerationRequest(PROMPT, num_inference_steps=steps, best_of=4))
    draft = draft_of(opened.models, request, steps, request.loras)
    assert (draft and draft.steps) == few
    plan = {stage.name: stage.flops for stage in make_plan(opened, request).stages}
    alone = make_plan(opened, GenerationRequest(PROMPT, num_inference_steps=steps)).stages
    whole = next(stage.flops for stage in alone if stage.name == "denoise")
    assert ("draft" in plan) == (few is not None)
    assert plan.get("draft", 0) + plan["denoise"] <= 1.9 * whole


def test_a_plan_counts_every_seed(judged_family):
    opened = TI2VidOneStagePipeline.from_model(str(judged_family / "tiny-dev.safetensors"))
    work = [
        next(s.flops for s in make_plan(opened, request).stages if s.name == "denoise")
        for request in (
            GenerationRequest(PROMPT, num_inference_steps=10, best_of=count) for count in (1, 4)
        )
    ]
    assert work[1] / work[0] == pytest.approx(1.9)


def test_a_best_of_clip_replays(judged_family, tmp_path):
    opened = TI2VidOneStagePipeline.from_model(str(judged_family / "tiny-dev.safetensors"))
    path = opened(PROMPT, best_of=2).save(tmp_path / "clip.mp4")
    replay = open_replay(path)
    assert replay.is_same(replay.run())


def test_what_is_missing_is_named_before_any_weight_is_read(tiny_model):
    opened = TI2VidOneStagePipeline.from_model(str(tiny_model))
    with pytest.raises(InputError, match=r"tiny-reward\.safetensors.*aiprod reward train"):
        opened(PROMPT, best_of=2)
    with pytest.raises(InputError, match="best_of must be from 1 to 64"):
        opened(PROMPT, best_of=0)


def test_a_file_is_scored_on_what_it_has(judged_family, tmp_path):
    opened = TI2VidOneStagePipeline.from_model(str(judged_family / "tiny-dev.safetensors"))
    whole = opened(PROMPT).save(tmp_path / "whole.mp4")
    silent = opened(PROMPT, generate_audio=False).save(tmp_path / "silent.mp4")
    scores = score_file(opened.models, whole)
    assert set(scores) == {"visual", "motion", "text", "sync", "overall"}
    parts = [scores[axis] for axis in ("visual", "motion", "text", "sync")]
    assert scores["overall"] == pytest.approx(sum(parts))
    assert set(score_file(opened.models, silent, PROMPT)) == {
        "visual", "motion", "text", "overall",
    }  # fmt: skip
