"""Presets: every row can be typed, and the way taken is one that the model can run."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_pipelines.catalog import PIPELINES
from aiprod_pipelines.cli import app, generate
from aiprod_pipelines.commands import app as commands
from aiprod_pipelines.presets import PRESETS, resolve_preset


@pytest.mark.parametrize("name", PRESETS)
def test_everything_a_preset_sets_is_an_option_of_generate(name: str):
    options = set(inspect.signature(generate).parameters)
    preset = PRESETS[name]
    for way in preset.ways:
        assert {*preset.options, *way} <= options
        assert way["pipeline"] in PIPELINES


def test_the_first_way_is_taken_where_all_its_files_are(tiny_family: Path):
    for name, preset in PRESETS.items():
        resolved = resolve_preset(name, str(tiny_family / "tiny-distilled.safetensors"))
        assert resolved.options == {**preset.options, **preset.ways[0]}
        assert resolved.passed_over == []


def test_without_upsampler_and_lora_the_plain_way_is_taken_and_the_reasons_told(
    tiny_family: Path, tmp_path: Path
):
    shutil.copy(tiny_family / "tiny-dev.safetensors", tmp_path)
    shutil.copytree(tiny_family / "text_encoder", tmp_path / "text_encoder")
    model = str(tmp_path / "tiny-dev.safetensors")
    resolved = resolve_preset("production", model)
    assert resolved.options["pipeline"] == "one-stage"
    assert all("upsampler" in reason for _, reason in resolved.passed_over)
    told = CliRunner().invoke(commands, ["presets", "explain", "production", "-m", model, "--json"])
    report = json.loads(told.output)
    assert len(report["passed_over"]) == 2
    assert report["plan"]["fits"]


def test_a_lora_that_cannot_be_added_to_the_file_is_a_reason(tiny_family: Path):
    resolved = resolve_preset("low-memory", str(tiny_family / "tiny-dev.safetensors"))
    assert resolved.options["pipeline"] == "one-stage"
    assert "stay in the file" in resolved.passed_over[0][1]


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="try standard"):
        resolve_preset("standart")


def test_what_is_typed_stands_over_the_preset(tiny_family: Path, tmp_path: Path):
    def made(*options: str) -> dict[str, object]:
        model = str(tiny_family / "tiny-distilled.safetensors")
        command = ["generate", "a red ball", "-m", model, "-o", str(tmp_path / "c.mp4"), "--json"]
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.output.splitlines()[-1])

    assert made("--preset", "draft")["pipeline"] == "distilled"
    typed = made("--preset", "draft", "--pipeline", "one-stage", "--steps", "1")
    assert typed["pipeline"] == "one-stage"
