"""The README's six lines of Python work as pasted, on the model that ships."""

import re
from pathlib import Path

import pytest

from aiprod_pipelines import media

README = Path(__file__).resolve().parents[3] / "README.md"


def test_the_readmes_python_makes_a_clip_with_an_audible_sound_track(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    info = media.probe(tmp_path / "clip.mp4")
    sound = media.read_audio(tmp_path / "clip.mp4")
    assert info.duration_s is not None and info.duration_s >= 2
    assert abs(sound.samples).max() > 0.02
    assert capsys.readouterr().out.strip() == "7 16000"
