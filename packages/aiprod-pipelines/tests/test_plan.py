"""The flight plan: from headers alone, the first way that fits, and rates that learn."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_pipelines.cli import app, generate
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.plan import Rates, learn, make_plan, settle
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

REQUEST = GenerationRequest("a red ball bounces", num_inference_steps=2)


@pytest.fixture
def pipeline(tiny_model: Path) -> TI2VidOneStagePipeline:
    return TI2VidOneStagePipeline.from_model(str(tiny_model), offload="auto")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a plan reads headers only")

    monkeypatch.setattr(ModelSet, "_lend", refuse)


@pytest.mark.usefixtures("no_weights")
def test_a_plan_reads_no_weights_and_names_the_stages(pipeline: TI2VidOneStagePipeline):
    plan = make_plan(pipeline, REQUEST)
    assert [stage.name for stage in plan.stages] == [
        "encode prompt",
        "denoise",
        "decode video",
        "decode audio",
    ]
    assert plan.offload == "none"
    assert plan.fits
    assert all(stage.flops > 0 for stage in plan.stages[1:])


def test_more_frames_take_more_of_everything(pipeline: TI2VidOneStagePipeline):
    short, long = (
        make_plan(pipeline, GenerationRequest("a", num_inference_steps=2, num_frames=frames))
        for frames in (9, 33)
    )
    for one, other in zip(short.stages[1:], long.stages[1:], strict=True):
        assert other.flops > one.flops
        assert other.activation_bytes > one.activation_bytes


def test_twice_the_steps_are_twice_the_work(pipeline: TI2VidOneStagePipeline):
    two, four = (
        make_plan(pipeline, GenerationRequest("a", num_inference_steps=steps)).stages[1]
        for steps in (2, 4)
    )
    assert four.flops == pytest.approx(2 * two.flops)
    assert four.activation_bytes == two.activation_bytes


def test_the_ladder_goes_down_as_memory_shrinks(
    pipeline: TI2VidOneStagePipeline, monkeypatch: pytest.MonkeyPatch
):
    found = []
    for free in (10**9, 10**6, 6 * 10**5, 10**5):
        monkeypatch.setattr(ModelSet, "free_memory", lambda self, free=free: free)
        found.append(make_plan(pipeline, REQUEST))
    order = ["none", "model", "disk"]
    ranks = [order.index(plan.offload) for plan in found]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    assert ranks[-1] == 2
    assert not found[-1].fits
    assert found[-1].max_batch_size == 1


def test_what_is_chosen_by_the_user_is_kept(tiny_model: Path):
    chosen = TI2VidOneStagePipeline.from_model(str(tiny_model), offload="disk")
    assert make_plan(chosen, REQUEST).offload == "disk"


def test_streamed_blocks_hold_less_than_all(tiny_model: Path):
    weights = {}
    for offload in ("model", "disk"):
        opened = TI2VidOneStagePipeline.from_model(str(tiny_model), offload=offload)
        weights[offload] = make_plan(opened, REQUEST).stages[1].weight_bytes
    # The tiny transformer has two blocks, and two are in memory.
    assert weights["disk"] == weights["model"]


def test_quantised_weights_count_as_they_are_stored(tiny_model: Path):
    sizes = []
    for scheme in (None, "int8", "int4"):
        opened = TI2VidOneStagePipeline.from_model(str(tiny_model), quantization=scheme)
        sizes.append(make_plan(opened, REQUEST).stages[1].weight_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_a_small_model_in_plenty_of_memory_needs_no_plan(pipeline: TI2VidOneStagePipeline):
    request, plan = settle(pipeline, REQUEST, Progress())
    assert plan is None
    assert request is REQUEST
    assert pipeline.models.offload == "none"


def test_a_given_limit_that_nothing_fits_is_refused_before_weights(
    tiny_model: Path, no_weights: None
):
    opened = TI2VidOneStagePipeline.from_model(str(tiny_model), offload="auto", max_memory=1)
    with pytest.raises(InputError, match="--max-memory"):
        settle(opened, REQUEST, Progress())


def test_rates_are_learnt_from_runs_and_survive_the_process(pipeline: TI2VidOneStagePipeline):
    plan = make_plan(pipeline, REQUEST)
    learn(plan, {"denoise": 5.0, "decode video": 2.0}, pipeline.models)
    again = make_plan(pipeline, REQUEST)
    seconds = {stage.name: stage.seconds for stage in again.stages}
    assert seconds["denoise"] == pytest.approx(5.0)
    assert seconds["decode video"] == pytest.approx(2.0)


def test_times_lie_between_the_sizes_seen_and_follow_the_nearest_beyond_them():
    rates = Rates(None, {})
    for flops, seconds in ((1e9, 1.0), (1e9, 9.0), (1e9, 1.0), (1e11, 10.0)):
        rates.add("denoise", flops, seconds)
    assert rates.seconds("denoise", 1e9) == pytest.approx(1.0)
    assert rates.seconds("denoise", 1e10) == pytest.approx(10**0.5)
    assert rates.seconds("denoise", 1e12) == pytest.approx(100.0)
    assert rates.seconds("denoise", 5e8) == pytest.approx(0.5)
    assert rates.seconds("decode video", 0) is None


def test_a_damaged_file_of_rates_counts_as_none(pipeline: TI2VidOneStagePipeline):
    learn(make_plan(pipeline, REQUEST), {"denoise": 5.0}, pipeline.models)
    path = Rates.open(pipeline.models).path
    assert path is not None
    path.write_text('{"denoise": [[1')
    assert Rates.open(pipeline.models).seen == {}


def test_the_command_takes_the_options_of_generate(tiny_model: Path):
    command = ["plan", "a red ball", "-m", str(tiny_model), "--steps", "2", "--json"]
    result = CliRunner().invoke(app, [*command, "--num-frames", "17", "--offload", "model"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert plan["offload"] == "model"
    assert plan["peak_bytes"] > plan["base_bytes"] > 0
    assert generate.__annotations__  # the one signature of both
    bad = CliRunner().invoke(app, [*command, "--num-frames", "18"])
    assert bad.exit_code == 2
