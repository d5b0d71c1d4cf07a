"""Batches: every line once, what is there is not made again, one failure ends nothing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_pipelines.batch import Job, made_here, one_after_the_other, read_jobs, run_batch
from aiprod_pipelines.commands import app

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: object) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines))
        return path

    return write


def fake(folder: Path, made: list[str], *, stop_after: int | None = None):
    """Makes files instead of clips, and can be stopped on the way."""

    def make_all(jobs: Sequence[Job]):
        for job in jobs:
            if len(made) == stop_after:
                raise KeyboardInterrupt
            made.append(job.output)
            (folder / job.output).write_text(job.request["prompt"])
            yield {"output": job.output, "digest": job.digest, "status": "done"}

    return make_all


def test_a_stopped_batch_goes_on_and_makes_nothing_twice(tmp_path: Path, write: Write):
    jobs = read_jobs(write(*[f"ball {i}" for i in range(5)]), {})
    folder = tmp_path / "clips"
    made: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_batch(jobs, folder, fake(folder, made, stop_after=3))
    entries = run_batch(jobs, folder, fake(folder, made))
    assert made == [job.output for job in jobs]
    assert [entry["output"] for entry in entries] == made
    assert run_batch(jobs, folder, fake(folder, made)) == entries
    assert len(made) == 5


def test_a_changed_line_or_a_lost_clip_is_made_again(tmp_path: Path, write: Write):
    folder = tmp_path / "clips"
    made: list[str] = []
    run_batch(read_jobs(write("one", "two", "three"), {}), folder, fake(folder, made))
    (folder / "00003.mp4").unlink()
    made.clear()
    run_batch(read_jobs(write("one", "other", "three"), {}), folder, fake(folder, made))
    assert made == ["00002.mp4", "00003.mp4"]
    made.clear()
    options = {"model": "another"}
    run_batch(read_jobs(write("one", "other", "three"), options), folder, fake(folder, made))
    assert len(made) == 3


def test_half_a_line_in_the_manifest_is_passed_over(tmp_path: Path, write: Write):
    jobs = read_jobs(write("one", "two"), {})
    folder = tmp_path / "clips"
    made: list[str] = []
    run_batch(jobs, folder, fake(folder, made))
    manifest = folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-20])
    run_batch(jobs, folder, fake(folder, made))
    assert made == ["00001.mp4", "00002.mp4", "00002.mp4"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a", "colour": "red"}], "line 1: unknown fields colour"),
        (["a", {"seed": 3}], "line 2: the request has no prompt"),
        ([{"prompt": "a", "output": "../a.mp4"}], "without folders"),
        ([{"prompt": "a", "output": "a.mp4"}, {"prompt": "b", "output": "a.mp4"}], "two lines"),
        ([3], "a prompt or an object"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_made(
    lines: list[object], message: str, write: Write
):
    with pytest.raises(InputError, match=message):
        read_jobs(write(*lines), {})


def test_one_clip_that_fails_ends_nothing_and_is_tried_again(
    tiny_model: Path, tmp_path: Path, write: Write
):
    path = write({"prompt": "a red ball", "num_frames": 10}, {"prompt": "a red ball"})
    folder = tmp_path / "clips"
    make = made_here("one-stage", {"model": str(tiny_model)}, folder)
    entries = run_batch(read_jobs(path, {}), folder, one_after_the_other(make))
    assert [entry["status"] for entry in entries] == ["failed", "done"]
    assert "num_frames" in entries[0]["error"]
    assert (folder / "00002.mp4").is_file()
    jobs: list[str] = []
    run_batch(read_jobs(path, {}), folder, fake(folder, jobs))
    assert jobs == ["00001.mp4"]


def test_the_command_says_what_failed_and_exits_with_1(
    tiny_model: Path, tmp_path: Path, write: Write
):
    path = write({"prompt": "a red ball", "num_frames": 10})
    command = ["batch", str(path), "-o", str(tmp_path / "clips"), "-m", str(tiny_model), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert json.loads(result.output)["failed"][0]["output"] == "00001.mp4"
