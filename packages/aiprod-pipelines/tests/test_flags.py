"""LTX-2's own flags: every one reaches its field, and what contradicts is refused."""

import sys
from pathlib import Path

import pytest

from aiprod_core.errors import InputError
from aiprod_pipelines import cli, flags
from aiprod_pipelines.catalog import PIPELINES, find_pipeline
from aiprod_pipelines.request import GenerationRequest, LoraFile, PerModality


def request_of(monkeypatch, name: str, *arguments: object) -> tuple[object, GenerationRequest]:
    """What `python -m aiprod_pipelines.MODULE` would run."""
    seen = []
    monkeypatch.setattr(cli, "write_clip", lambda *args, **kwargs: seen.append(args))
    with pytest.raises(SystemExit) as stop:
        flags.main(find_pipeline(name), [str(argument) for argument in arguments])
    assert stop.value.code == 0
    pipeline, request, _ = seen[0]
    return pipeline, request


def test_a_published_command_line_becomes_the_request_that_it_means(
    monkeypatch, tiny_model: Path, picture: Path
):
    pipeline, request = request_of(
        monkeypatch, "two-stages",
        "--checkpoint-path", tiny_model, "--spatial-upsampler-path", "up.safetensors",
        "--distilled-lora", "fast.safetensors", 0.8, "--lora", "a.safetensors",
        "--lora", "b.safetensors", 0.5, "--prompt", "a red ball", "--output-path", "out.mp4",
        "--seed", 7, "--height", 64, "--num-frames", 9, "--image", picture, 0, 0.9,
        "--image", picture, 8, 1.0, "--video-cfg-guidance-scale", 4,
        "--a2v-guidance-scale", 2, "--audio-skip-step", 1, "--video-stg-blocks", 0, 1,
        "--max-batch-size", 2, "--no-audio", "--device", "cpu",
    )  # fmt: skip
    assert pipeline.name == "two-stages" and pipeline.models.name == str(tiny_model)
    assert request == GenerationRequest(
        "a red ball",
        seed=7,
        height=64,
        num_frames=9,
        images=((picture, 0, 0.9), (picture, 8, 1.0)),
        loras=(LoraFile("a.safetensors"), LoraFile("b.safetensors", 0.5)),
        distilled_lora=LoraFile("fast.safetensors", 0.8),
        spatial_upsampler="up.safetensors",
        cfg_scale=PerModality(4.0, 2.0),  # the half that is not given is the model's
        modality_scale=PerModality(2.0, 1.0),
        skip_step=PerModality(0, 1),
        stg_blocks=(0, 1),
        max_batch_size=2,
        generate_audio=False,
    )


def test_references_and_edits_have_their_published_names(monkeypatch, tiny_model: Path):
    common = ("--distilled-checkpoint-path", tiny_model, "--prompt", "x", "--output-path", "o.mp4")
    _, request = request_of(
        monkeypatch, "ic-lora", *common, "--video-conditioning", "a.mp4", 0.5,
        "--reference-video", "b.mp4",
    )  # fmt: skip
    kinds = [(control.kind, str(control.path), control.strength) for control in request.controls]
    assert kinds == [("reference", "a.mp4", 0.5), ("reference", "b.mp4", 1.0)]
    _, request = request_of(
        monkeypatch, "retake", *common, "--video-path", "c.mp4", "--start-time", 1, "--end-time", 2
    )
    assert (request.source, request.start_time, request.end_time) == (Path("c.mp4"), 1.0, 2.0)
    _, request = request_of(
        monkeypatch, "audio-to-video", *common, "--audio-path", "d.wav", "--audio-start-time", 3
    )
    assert (request.audio, request.audio_start_time) == (Path("d.wav"), 3.0)


def test_every_flag_names_a_field_that_there_is():
    fields = set(GenerationRequest.__dataclass_fields__) | set(flags.MODEL_OPTIONS)
    targets = {flag.target.partition(".")[0] for flag in flags.FLAGS} - {"reference_strength"}
    assert targets <= fields


@pytest.mark.parametrize("name", PIPELINES)
def test_every_module_runs_by_itself(name: str, capsys):
    with pytest.raises(SystemExit) as stop:
        flags.main(find_pipeline(name), ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m aiprod_pipelines.{PIPELINES[name].module}" in shown
    module = sys.modules[find_pipeline(name).__module__]
    assert module.__name__ == f"aiprod_pipelines.{PIPELINES[name].module}"


def test_what_a_user_can_mend_ends_with_2(monkeypatch, tiny_model: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments = ["--prompt", "x", "--output-path", "o.avi", "--checkpoint-path"]
        flags.main(find_pipeline("one-stage"), [*arguments, str(tiny_model)])
    assert stop.value.code == 2
    assert "try o.mp4" in capsys.readouterr().err
    with pytest.raises(InputError, match="contradicts another flag for stg_blocks"):
        flags.collect({"--video-stg-blocks": [1], "--audio-stg-blocks": [2]})
    with pytest.raises(InputError, match=r"--lora is PATH \[STRENGTH\]; got a b"):
        flags.collect({"--lora": [["a", "b"]]})
