"""Configurations: unknown keys, overrides and values of the wrong kind."""

import pytest

from aiprod_core.errors import InputError
from aiprod_trainer.config import Section, read_config, run_script


class Inner(Section):
    learning_rate: float = 1e-3


class Outer(Section):
    steps: int = 10
    optimization: Inner = Inner()


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_an_unknown_key_names_the_nearest_one(tmp_path):
    path = write(tmp_path, "optimization: {learning_rat: 0.1}")
    with pytest.raises(
        InputError, match=r"optimization.learning_rat; did you mean .*learning_rate"
    ):
        read_config(path, Outer)


def test_overrides_reach_nested_keys(tmp_path):
    path = write(tmp_path, "steps: 3")
    config = read_config(path, Outer, ["optimization.learning_rate=0.5", "steps=7"])
    assert (config.steps, config.optimization.learning_rate) == (7, 0.5)


def test_a_value_of_the_wrong_kind_names_the_key(tmp_path):
    with pytest.raises(InputError, match="steps"):
        read_config(write(tmp_path, "steps: many"), Outer)


@pytest.mark.parametrize("text", ["steps: [", "{a: b: c}"])
def test_broken_yaml_is_one_sentence(tmp_path, text):
    with pytest.raises(InputError, match="not valid YAML"):
        read_config(write(tmp_path, text), Outer)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such configuration file"):
        read_config(tmp_path / "absent.yaml", Outer)


def test_a_script_exits_with_2_and_one_sentence(tmp_path, monkeypatch, capsys):
    config = write(tmp_path, "stepz: 3")
    monkeypatch.setattr("sys.argv", ["train", str(config), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        run_script("Trains.", Outer, lambda config, folder: folder.mkdir())
    assert stopped.value.code == 2
    assert "did you mean steps?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_script_hands_its_configuration_and_folder_to_the_training(tmp_path, monkeypatch):
    config = write(tmp_path, "steps: 3")
    seen = []
    monkeypatch.setattr("sys.argv", ["train", str(config), "--out", "run", "--set", "steps=4"])
    run_script("Trains.", Outer, lambda config, folder: seen.append((config.steps, folder.name)))
    assert seen == [(4, "run")]
