"""Streams: playable while they grow, the same clip in the end, in memory that does not grow."""

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from aiprod_core.components import denoising
from aiprod_core.errors import InputError
from aiprod_pipelines import decoding, media
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.recipe import read_recipe
from aiprod_pipelines.replay import open_replay
from aiprod_pipelines.streaming import write_stream
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

FPS, RATE = 12, 16000


def chunks(count: int, drawn: list[int] | None = None):
    """Eight frames each, ever brighter; `drawn` learns how many were asked for."""
    for i in range(count):
        if drawn is not None:
            drawn.append(i)
        yield np.full((8, 32, 48, 3), 10 + 12 * i, np.uint8)


def click(at_s: float, duration_s: float) -> media.Audio:
    samples = np.zeros((2, round(duration_s * RATE)), np.float32)
    start = round(at_s * RATE)
    samples[:, start : start + 800] = np.sin(np.arange(800) * 0.3)
    return media.Audio(samples, RATE)


def count_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_segments_come_before_the_next_frames_are_asked_for_and_play_at_once():
    drawn: list[int] = []
    stream = media.fragments(chunks(12, drawn), FPS, audio=click(1, 8))
    first = next(stream)
    assert len(drawn) <= 2
    assert count_frames(first) >= 3
    second = next(stream)
    assert count_frames(first + second) > count_frames(first)
    assert len(drawn) < 4


def test_all_segments_are_one_file_with_sound_in_place_and_metadata(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    stream = media.fragments(chunks(6), FPS, audio=click(1.5, 4), metadata={"comment": "é" * 3000})
    written = write_stream(stream, path)
    assert written.num_bytes == path.stat().st_size
    assert 0 < written.first_segment_s <= written.total_s
    info = media.probe(path)
    assert (info.num_frames, info.fps, info.audio_sample_rate) == (48, FPS, RATE)
    assert info.metadata["comment"] == "é" * 3000
    samples = media.read_audio(path).samples[0]
    onset = np.argmax(np.abs(samples) > 0.3) / RATE
    assert onset == pytest.approx(1.5, abs=0.005)
    frames = list(media.read_frames(path))
    assert len(frames) == 48
    assert np.all(np.diff([frame.mean() for frame in frames[::8]]) > 8)


def test_a_failed_stream_leaves_no_file(tmp_path: Path):
    def failing():
        yield b"begun"
        assert (tmp_path / "clip.mp4").read_bytes() == b"begun"
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        write_stream(failing(), tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot be written"):
        write_stream([b"x"], tmp_path / "absent" / "clip.mp4")


def test_a_reader_that_leaves_is_one_sentence(monkeypatch):
    class Closed(io.RawIOBase):
        def write(self, data):
            raise BrokenPipeError

    class Stdout:
        buffer = Closed()

        def fileno(self):
            return spare.fileno()

    with open("/dev/null", "w") as spare:
        monkeypatch.setattr(sys, "stdout", Stdout())
        with pytest.raises(InputError, match="standard output was closed"):
            write_stream([b"x"], "-")


def test_a_pipelines_stream_is_its_clip_with_its_recipe(tiny_model: Path, tmp_path: Path):
    pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")
    settings = {"seed": 3, "num_frames": 121, "num_inference_steps": 1, "tile": "64x64x32"}
    segments = list(pipeline.stream("a red ball", **settings))
    assert len(segments) > 4
    path = tmp_path / "clip.mp4"
    write_stream(segments, path)
    clip = pipeline("a red ball", **settings)
    assert read_recipe(path) == clip.recipe
    whole = np.concatenate([np.asarray(part) for part in clip.frames()])
    streamed = np.stack(list(media.read_frames(path)))
    assert streamed.shape == whole.shape == (121, 32, 48, 3)
    # The picture is noise, whose finest grain H.264 drops: compare blocks of 8 x 8.
    blocks, others = (x.reshape(121, 4, 8, 6, 8, 3).mean(axis=(2, 4)) for x in (streamed, whole))
    assert np.abs(blocks - others).mean() < 3 < np.abs(blocks[1:] - others[:-1]).mean()
    assert clip.audio is not None
    assert media.read_audio(path).duration_s == pytest.approx(121 / 12, abs=0.1)


WINDOWS = {"num_frames": 41, "window_frames": 17, "window_overlap": 4, "seed": 3}


@pytest.mark.parametrize("name", ["distilled", "two-stages"])
def test_a_stream_of_windows_begins_before_the_second_is_made_and_is_the_whole_clip(
    name: str, tiny_family: Path, tmp_path: Path, monkeypatch
):
    pipeline = find_pipeline(name).from_model(
        str(tiny_family / "tiny-dev.safetensors"), device="cpu"
    )
    settings = WINDOWS | ({} if name == "distilled" else {"num_inference_steps": 2})
    windows: list[int] = []
    original = denoising.denoise
    monkeypatch.setattr(
        denoising, "denoise", lambda *args, **kw: windows.append(1) or original(*args, **kw)
    )
    stream = pipeline.stream("a red ball", **settings)
    segments = [next(stream)]
    assert len(windows) == 2  # in both stages
    assert count_frames(segments[0]) >= 2
    segments += stream
    assert len(windows) == 3 * 2
    path = tmp_path / "clip.mp4"
    write_stream(segments, path)

    whole = pipeline("a red ball", **settings)
    assert read_recipe(path) == whole.recipe  # the hash of the latents too
    other = tmp_path / "whole.mp4"
    write_stream(whole.stream(), other)
    streamed, expected = (np.stack(list(media.read_frames(p))) for p in (path, other))
    assert streamed.shape[0] == 41 and np.array_equal(streamed, expected)
    assert np.array_equal(media.read_audio(path).samples, media.read_audio(other).samples)
    assert (
        open_replay(path, device="cpu").run().recipe["latents_sha256"]
        == (whole.recipe["latents_sha256"])
    )


def test_sound_decoded_in_parts_is_the_sound_decoded_whole():
    models = ModelSet.open("nano", device="cpu")
    count, duration_s = 60, 2.4
    latent = torch.randn(1, 2, count, 16, generator=torch.Generator().manual_seed(0))
    asked: list[int] = []

    def until(n: int) -> torch.Tensor:
        asked.append(n)
        made = latent.clone()
        made[:, :, max(n, 1) :] = torch.nan  # what is not made yet must not be heard
        return made

    streamed = decoding.decode_audio_parts(models, until, duration_s, Progress())
    parts = list(streamed.parts)
    whole = decoding.decode_audio(models, latent, duration_s, Progress())
    assert len(parts) == 3 and asked == [0, 20, 45, 60]
    assert np.abs(np.concatenate(parts, axis=1) - whole.samples).max() < 1e-4
    assert streamed.sample_rate == whole.sample_rate


def test_a_stage_within_another_does_not_count_twice(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr("aiprod_pipelines.progress.time.monotonic", lambda: next(now))
    progress = Progress()
    with progress.stage("decode"):
        with progress.stage("denoise"):
            pass
        with progress.stage("denoise"):
            pass
    assert progress.seconds == {"denoise": 5.0, "decode": 5.0}
