import numpy as np
from PIL import Image

from aiprod_trainer.world.contact_sheet import contact_sheet, main


def test_a_sheet_shows_a_tone_only_when_and_where_it_sounds():
    frames = np.full((24, 64, 64, 3), 90, dtype=np.uint8)
    t = np.arange(32000) / 16000
    audio = np.where(t > 1.0, 0.1 * np.sin(2 * np.pi * 1000 * t), 0)[None].repeat(2, 0)
    sheet = contact_sheet(frames, audio, fps=12.0)
    top = sheet.shape[1] // 24 + 2  # below a row of square frames
    spectrogram = sheet[top : top + 72].astype(int).sum(-1)
    half = sheet.shape[1] // 2
    assert spectrogram[:, : half - 30].max() < 80
    lit = spectrogram[:, half + 60 : -60].mean(1)
    row = np.argmax(lit)
    hz = np.geomspace(8000 * 0.97, 60, 72)[row]
    assert 900 < hz < 1100


def test_the_command_writes_a_png_of_scenes(tmp_path):
    out = tmp_path / "sheets.png"
    assert main(["--count", "1", "--size", "64", "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["sheets.png"]
