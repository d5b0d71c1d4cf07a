"""Prompts, kept clips, scores against the truth, comparison and page of `aiprod eval`."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_trainer.evaluation.clips import make_clips, open_pipeline
from aiprod_trainer.evaluation.commands import app
from aiprod_trainer.evaluation.comparison import compare_rows
from aiprod_trainer.evaluation.page import write_page
from aiprod_trainer.evaluation.prompts import Prompt, read_prompts, world_prompts
from aiprod_trainer.evaluation.scores import (
    Row,
    distilled_share,
    is_reached,
    judge_clip,
    score_rows,
    sync_scores,
)
from aiprod_trainer.world.captions import HELD_OUT, WORDS
from aiprod_trainer.world.render import render
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise


def save_render(path: Path, prompt: Prompt, *, late_s: float = 0.0) -> Path:
    """The scene of a prompt as the file that a perfect model would make."""
    assert prompt.scene is not None
    sound = np.roll(synthesise(prompt.scene), round(late_s * SAMPLE_RATE), axis=1)
    audio = media.Audio(sound, SAMPLE_RATE)
    media.write_video(path, [render(prompt.scene, 128)], prompt.scene.fps, audio=audio, crf=12)
    return path


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return world_prompts(5, "v1", 2026)


@pytest.fixture(scope="module")
def rows(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        judge_clip(save_render(folder / f"{number:04}.mp4", prompt), prompt)
        for number, prompt in enumerate(prompts)
    ]


def test_every_other_prompt_uses_only_words_that_no_training_caption_has(prompts):
    for prompt in prompts:
        assert prompt.scene is not None
        if "colour" in prompt.stated:
            word = prompt.scene.body.colour
            held, known = (
                any(phrase in prompt.text.lower() for phrase in table["colour"][word])
                for table in (HELD_OUT, WORDS)
            )
            assert held == prompt.has_synonyms, prompt.text
            assert known or held  # "salmon-pink" is both
    assert [p.has_synonyms for p in prompts[:4]] == [False, True, False, True]


def test_prompts_are_the_same_for_a_seed_and_others_for_another(prompts):
    assert [p.text for p in world_prompts(5, "v1", 2026)] == [p.text for p in prompts]
    assert world_prompts(1, "v1", 3)[0].text != prompts[0].text


def test_a_perfect_model_scores_1_in_all_that_was_asked(rows):
    scores = score_rows(rows)
    for name in ("colour", "shape", "motion", "sound", "in_sync"):
        assert scores[name] == 1.0, name
    assert scores["colour_n"] == sum("colour" in row.right for row in rows)
    assert scores["camera"] is None  # no caption of v1 speaks of a camera
    assert scores["sync_ms"] < 10 < scores["sync_shuffled_ms"]


def test_clips_of_other_prompts_score_low(rows, prompts):
    moved = [judge_clip(row.file, prompt) for row, prompt in zip(rows, prompts[1:], strict=False)]
    assert np.mean([row.score for row in moved]) < 0.8


def test_late_sound_is_out_of_sync_and_silence_is_not_in_sync(prompts, tmp_path):
    eventful = next(p for p in prompts if p.scene.body.motion == "fall")
    late = judge_clip(save_render(tmp_path / "late.mp4", eventful, late_s=0.15), eventful)
    assert late.sync_ms == pytest.approx(150, abs=15)
    media.write_video(tmp_path / "mute.mp4", [render(eventful.scene, 128)], 12.0)
    mute = judge_clip(tmp_path / "mute.mp4", eventful)
    mute.is_eventful = late.is_eventful = True
    assert sync_scores([mute]) | {"sync_n": 0} == sync_scores([mute])
    assert sync_scores([late, mute])["in_sync"] == 0.0


def test_goals_have_directions():
    assert is_reached("colour", 0.95) and not is_reached("colour", 0.94)
    assert is_reached("sync_ms", 40.0) and not is_reached("sync_ms", 41.0)
    assert is_reached("colour", None) is None and is_reached("size", 1.0) is None


def test_the_distilled_share_is_a_ratio_of_means():
    dev = dict.fromkeys(("colour", "shape", "motion", "sound", "in_sync"), 0.8) | {"camera": None}
    student = dev | {"colour": 0.4}
    assert distilled_share(dev, student) == pytest.approx(3.6 / 4.0)


# Comparison.


def test_a_set_of_clips_does_not_differ_from_itself_and_does_from_a_worse_one(rows, prompts):
    assert not any(d.is_clear or d.difference for d in compare_rows(rows, rows))
    worse = [Row(row.file, row.prompt, row.report, dict.fromkeys(row.right, False)) for row in rows]
    score = next(d for d in compare_rows(rows, worse) if d.name == "score")
    assert (score.a, score.b, score.difference) == (1.0, 0.0, -1.0)
    assert score.is_clear
    with pytest.raises(InputError, match="same prompts"):
        compare_rows(rows, rows[::-1])


def test_intervals_cover_the_true_difference_about_as_often_as_they_say(rows):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(20):
        a, b = [], []
        for row in rows * 4:
            base = rng.normal(10, 5)
            for side, value in ((a, base), (b, base + rng.normal(1.0, 2.0))):
                other = Row(row.file, row.prompt, type(row.report)({"x": float(value)}, {}, {}))
                side.append(other)
        (d,) = compare_rows(a, b)
        assert d.high - d.low < 3  # pairing takes the spread of 5 out
        covered += d.low <= 1.0 <= d.high
    assert covered >= 16


# Prompts from a file.


def test_prompts_of_a_file_may_state_what_the_judge_shall_look_for(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(
        "# mine\na dog barks\n\n"
        '{"prompt": "a crimson orb heads left", "colour": "red", "shape": "ball", '
        '"motion": "roll left"}\n'
    )
    plain, known = read_prompts(file, "v1")
    assert plain.scene is None and plain.text == "a dog barks"
    assert known.scene.body.colour == "red"
    assert known.stated == {"colour", "shape", "motion", "sound"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"colour": "red"}', "prompt"),
        ('{"prompt": "x", "color": "red"}', "color"),
        ('{"prompt": "x", "colour": "crimson"}', "crimson"),
        ('{"prompt": ', "line 1"),
        ("", "no prompt"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.txt"
    file.write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        read_prompts(file, "v1")


# Page and command.


def test_the_page_shows_the_worst_first_and_fetches_nothing(rows, tmp_path):
    wrong = Row(rows[4].file, "<b>worst</b>", rows[4].report, {"colour": False})
    shown = [*rows[:3], wrong]
    page = write_page(tmp_path / "page", shown, title="t", subtitle="", scores=score_rows(shown))
    text = page.read_text()
    assert "&lt;b&gt;worst&lt;/b&gt;" in text and "<b>worst" not in text
    assert text.index("worst&lt;") < text.index(rows[0].prompt[:20])
    assert not re.search(r"(?:https?:)?//[a-z]", text)
    sources = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(sources) == 8
    assert all((page.parent / source).is_file() for source in sources)


def run(*arguments: object) -> dict | str:
    """The JSON file that the command writes, or its one sentence of error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exit_code == 2:
        return result.output
    assert result.exit_code == 0, result.output
    return json.loads(Path(arguments[arguments.index("--json") + 1]).read_text())  # type: ignore[arg-type]


def test_a_stopped_evaluation_goes_on_with_the_clips_that_it_has(tiny_model, tmp_path):
    clips = tmp_path / "clips"
    command = ("eval", "--model", tiny_model, "--num-prompts", 2, "--clips-dir", clips)
    command += ("--set", "height=64", "--set", "width=64", "--set", "num_frames=9")
    command += ("--json", tmp_path / "scores.json")
    first = run(*command)
    kept = (clips / "0000.mp4").stat().st_mtime_ns
    (clips / "0001.mp4").unlink()
    assert run(*command) == first
    assert (clips / "0000.mp4").stat().st_mtime_ns == kept
    run(*command, "--seed", 5)
    assert (clips / "0000.mp4").stat().st_mtime_ns != kept
    for key in ("vae_psnr", "audio_onset_ms", "audio_class", "colour", "shape", "motion"):
        assert key in first
    for key in ("camera", "sound", "sync_ms", "sync_shuffled_ms"):
        assert key in first


def test_clips_that_another_run_replaced_are_not_judged(tiny_model, tmp_path, monkeypatch):
    pipeline = open_pipeline(str(tiny_model), "one-stage")
    made = pipeline.run

    def run_beside_another(request):
        if request.seed == 6:
            shutil.copy(tmp_path / "theirs.mp4", tmp_path / "0000.mp4")
        return made(request)

    size = {"height": 64, "width": 64, "num_frames": 9}
    prompts = [Prompt("a red ball"), Prompt("a ball")]
    make_clips(pipeline, prompts[1:], tmp_path, seed=8, settings=size)
    (tmp_path / "0000.mp4").rename(tmp_path / "theirs.mp4")
    monkeypatch.setattr(pipeline, "run", run_beside_another)
    with pytest.raises(InputError, match=r"1 of 2 clips .* such as 0000\.mp4"):
        make_clips(pipeline, prompts, tmp_path, seed=5, settings=size)
    monkeypatch.undo()
    assert len(make_clips(pipeline, prompts, tmp_path, seed=5, settings=size)) == 2


def test_a_best_of_several_seeds_is_no_strange_clip(tmp_path):
    """Though its recipe names the seed that was chosen, and so not the one asked for."""
    settings = {"best_of": 2, "num_frames": 9, "num_inference_steps": 4}
    (path,) = make_clips(
        open_pipeline("nano", "one-stage"),
        [Prompt("a red ball")],
        tmp_path,
        seed=5,
        settings=settings,
    )
    assert path.is_file()


def test_files_and_folders_are_measured_without_a_model(rows, tmp_path):
    out = tmp_path / "measures.json"
    found = run("eval", rows[0].file.parent, "--json", out, "--html", tmp_path / "page")
    assert {Path(clip["file"]).name for clip in found["clips"]} == {r.file.name for r in rows}
    assert (tmp_path / "page" / "index.html").is_file()
    assert "one of the two" in run("eval", "--json", out)
    assert "no such file" in run("eval", tmp_path / "none.mp4", "--json", out)
    assert "NAME=VALUE" in run("eval", "-m", "nano", "--set", "x", "--json", out)
