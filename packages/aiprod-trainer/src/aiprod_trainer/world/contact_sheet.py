"""A clip on one page: its frames in a row, and below them, on the same time axis, its sound.

    python -m aiprod_trainer.world.contact_sheet --seed 3 --count 12 --out sheets.png
    python -m aiprod_trainer.world.contact_sheet --clip clip.mp4 --out sheet.png

White ticks mark what the judge hears, yellow ones what it sees.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aiprod_core.errors import InputError
from aiprod_pipelines.media import probe, read_audio, read_frames
from aiprod_trainer.world.captions import caption
from aiprod_trainer.world.judge import judge
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import WORLDS, sample_scene
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise

BAND = 72  # pixels of the spectrogram
WAVE = 36  # pixels of the waveform
INK, PAPER = (232, 232, 236), (18, 18, 22)
# Dark blue to yellow, evenly lighter: black, blue, magenta, orange, pale yellow.
HEAT = np.array([(8, 8, 20), (52, 24, 110), (176, 44, 110), (246, 140, 50), (252, 244, 170)])


def contact_sheet(
    frames: np.ndarray,
    audio: np.ndarray,
    *,
    title: str = "",
    sample_rate: int = SAMPLE_RATE,
    fps: float = 12.0,
    seen_s: Sequence[float] = (),
    heard_s: Sequence[float] = (),
    width: int = 1600,
) -> np.ndarray:
    """Draws frames uint8 (F, H, W, 3) and audio (channels, samples) as uint8 (height, width, 3).

    Every n-th frame is shown, n as small as the width allows; times run from 0 to F / fps.
    """
    duration = len(frames) / fps
    columns = min(len(frames), max(width // frames.shape[2], 1))
    every = -(-len(frames) // columns)
    shown = frames[::every]
    cell = width // len(shown)
    height = round(cell * frames.shape[1] / frames.shape[2])
    row = np.concatenate(
        [np.asarray(Image.fromarray(frame).resize((cell, height))) for frame in shown], axis=1
    )
    width = row.shape[1]
    top = 20 if title else 0
    sheet = np.full((top + height + BAND + WAVE + 4, width, 3), PAPER, dtype=np.uint8)
    sheet[top : top + height] = row
    # The last shown frame may stand for less time than its cell: the sound ends with the clip.
    span = round(width * len(frames) / (len(shown) * every))
    below = top + height + 2
    sheet[below : below + BAND, :span] = _spectrogram(audio, sample_rate, duration, span)
    wave_top = below + BAND + 1
    sheet[wave_top : wave_top + WAVE, :span] = _waveform(audio, sample_rate, duration, span)

    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    if title:
        draw.text((4, 3), title, fill=INK, font=ImageFont.load_default(12))
    for times, ink, first, last in (
        (heard_s, (255, 255, 255), below, below + 10),
        (seen_s, (255, 220, 40), wave_top, wave_top + WAVE),
    ):
        for time in times:
            x = round(time / duration * span)
            draw.line([(x, first), (x, last)], fill=ink, width=1)
    return np.asarray(image)


def _spectrogram(audio: np.ndarray, sample_rate: int, duration: float, width: int) -> np.ndarray:
    """Level on a logarithmic frequency axis from 60 Hz to the Nyquist frequency, 60 dB deep."""
    mono = np.pad(audio.mean(0), 512)
    centres = (np.arange(width) + 0.5) / width * duration * sample_rate
    starts = np.clip(centres.astype(int), 0, max(len(mono) - 1024, 0))
    pieces = mono[starts[:, None] + np.arange(1024)] * np.hanning(1024)
    power = np.square(np.abs(np.fft.rfft(pieces, axis=1)))  # (width, 513)
    hz = np.geomspace(sample_rate / 2 * 0.97, 60, BAND)
    level = 10 * np.log10(power[:, np.round(hz * 1024 / sample_rate).astype(int)].T + 1e-6)
    return _heat(np.clip((level - 34) / 60 + 1, 0, 1))


def _waveform(audio: np.ndarray, sample_rate: int, duration: float, width: int) -> np.ndarray:
    """Left channel above the middle, right channel below."""
    edges = np.linspace(0, duration * sample_rate, width + 1).astype(int)
    loud = np.abs(np.stack([audio[0], audio[-1]]))
    loud = np.pad(loud, ((0, 0), (0, max(edges[-1] - loud.shape[1], 0) + 1)))
    peaks = np.maximum.reduceat(loud, edges[:-1], axis=1)
    half = WAVE // 2
    reach = np.ceil(np.clip(peaks, 0, 1) * half)
    steps = np.arange(half)[:, None]
    inside = np.concatenate([steps[::-1] < reach[0], steps < reach[1]])
    return np.where(inside[..., None], (120, 190, 240), PAPER).astype(np.uint8)


def _heat(values: np.ndarray) -> np.ndarray:
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, stops, HEAT[:, i]) for i in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def stack_sheets(sheets: Sequence[np.ndarray]) -> np.ndarray:
    """Sheets below one another, padded to the widest."""
    width = max(sheet.shape[1] for sheet in sheets)
    padded = [
        np.pad(sheet, ((0, 6), (0, width - sheet.shape[1]), (0, 0)), constant_values=PAPER[0])
        for sheet in sheets
    ]
    return np.concatenate(padded)


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes under a temporary name and renames when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    Image.fromarray(image).save(temporary, format="PNG")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws clips with their sound on one page.")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--clip", type=Path, nargs="*", default=[], help="video files to draw")
    parser.add_argument("--count", type=int, default=12, help="scenes to draw without --clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--world", default="v1", choices=WORLDS)
    arguments = parser.parse_args(argv)
    try:
        if arguments.clip:
            sheets = [_sheet_of_file(path) for path in arguments.clip]
        else:
            rng = np.random.default_rng(arguments.seed)
            sheets = [
                _sheet_of_scene(rng, arguments.size, arguments.world)
                for _ in range(arguments.count)
            ]
        write_png(arguments.out, stack_sheets(sheets))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


def _sheet_of_scene(rng: np.random.Generator, size: int, world: str) -> np.ndarray:
    scene = sample_scene(rng, world=world)
    frames, audio = render(scene, size), synthesise(scene)
    verdict = judge(frames, audio) if size % 64 == 0 else None
    return contact_sheet(
        frames,
        audio,
        title=caption(scene, rng),
        fps=scene.fps,
        seen_s=verdict.seen_s if verdict else (),
        heard_s=verdict.heard_s if verdict else (),
    )


def _sheet_of_file(path: Path) -> np.ndarray:
    frames = np.stack(list(read_frames(path)))
    audio = read_audio(path, sample_rate=SAMPLE_RATE, channels=2).samples
    return contact_sheet(frames, audio, title=path.stem, fps=probe(path).fps or 12.0)


if __name__ == "__main__":
    raise SystemExit(main())
