"""Preparation: what is kept and why, what parts hold, and that kills and workers leave no trace."""

import html.parser
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_trainer.data import LatentDataset
from aiprod_trainer.dataset.clips import Settings, parse_buckets, verify
from aiprod_trainer.dataset.encode import mask_on_grid, mask_on_time
from aiprod_trainer.dataset.prepare import (
    Model,
    RunOptions,
    process_captions,
    process_dataset,
    process_videos,
)
from aiprod_trainer.dataset.tables import Clip, read_clips
from aiprod_trainer.dataset.workers import Workers
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import sample_scene
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise

# The tiny model's codec covers 4 frames and 8x8 pixels; its clips run at 12 frames a second.
SETTINGS = Settings(parse_buckets("32x32x9;48x32x9"), 12.0, clips_per_part=3)

# The command, in a process that is killed in the middle of its n-th write.
KILLED = """
import os, signal, sys

if __name__ == "__main__":
    count, real = int(sys.argv[1]), os.fsync

    def fsync(handle):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync
    from aiprod_pipelines.cli import main

    main(sys.argv[2:])
"""


def write_clip(path: Path, frames: np.ndarray, audio: np.ndarray | None = None) -> None:
    sound = None if audio is None else media.Audio(audio.astype(np.float32), SAMPLE_RATE)
    media.write_video(path, [frames], 12, audio=sound)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the procedural world: six good clips (one without sound, one wide), a double under
    another name, one named twice, one cut short, one damaged inside, and one that is no video."""
    folder = tmp_path_factory.mktemp("footage")
    rng = np.random.default_rng(5)
    for index in range(6):
        scene = sample_scene(rng, world="v1")
        frames, sound = render(scene, 64)[:13], synthesise(scene)[:, : round(13 / 12 * SAMPLE_RATE)]
        if index == 4:
            frames = frames[:, :42]
        write_clip(folder / f"good{index}.mp4", frames, None if index == 3 else sound)
    good = (folder / "good0.mp4").read_bytes()
    (folder / "double.mp4").write_bytes(good)
    start = good.find(b"mdat")
    (folder / "short.mp4").write_bytes(good[: start + (len(good) - start) // 2])
    flipped = bytearray(good)
    flipped[start + 700 : start + 800] = bytes(100)
    (folder / "damaged.mp4").write_bytes(flipped)
    (folder / "text.mp4").write_text("not a video")
    names = [f"good{i}" for i in range(6)] + ["double", "short", "damaged", "text", "good1"]
    lines = [{"video": f"{name}.mp4", "caption": "a red ball bounces"} for name in names]
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def table(footage: Path) -> list[Clip]:
    return read_clips(footage / "clips.jsonl")


@pytest.fixture(scope="module")
def prepared(table, tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    summary = process_dataset(table, folder, Model(str(tiny_model)), SETTINGS)
    assert summary.as_json() == {
        "clips": 11,
        "kept": 6,
        "skipped": 3,
        "duplicate": 2,
        "parts": 4,
        "encoded_parts": 4,
    }
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_left_out_is_listed_with_the_reason(prepared):
    lines = [json.loads(line) for line in (prepared / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["clip"]: (line["state"], line["reason"]) for line in lines}
    assert reasons.keys() == {
        "double.mp4",
        "short.mp4",
        "damaged.mp4",
        "text.mp4",
        "good1.mp4",
    }
    assert reasons["double.mp4"] == ("duplicate", "the same picture and sound as good0.mp4")
    assert reasons["short.mp4"][0] == "skipped"
    assert "not media that can be read" in reasons["text.mp4"][1]
    rows = [json.loads(line) for line in (prepared / "clips.jsonl").read_text().splitlines()]
    assert [row["clip"] for row in rows if row["state"] == "kept"] == [
        f"good{i}.mp4" for i in range(6)
    ]


def test_the_trainer_reads_what_was_prepared(prepared):
    data = LatentDataset(prepared, max_length=16)
    assert len(data) == 6
    shapes = [(len(b.clips), b.fps, b.shapes) for b in data.buckets]
    assert sorted(count for count, _, _ in shapes) == [1, 1, 4]
    assert all(fps == 12 for _, fps, _ in shapes)
    square = {"audio": (2, 19, 16), "video": (8, 3, 4, 4)}
    assert (4, 12.0, square) in shapes
    assert (1, 12.0, {"video": (8, 3, 4, 4)}) in shapes  # without sound
    assert (1, 12.0, square | {"video": (8, 3, 4, 6)}) in shapes
    batch = data.draw(data.buckets[0], [np.random.default_rng(0)], caption_dropout=1.0)
    assert batch.mask.sum() == 2  # the empty caption: its two marks


def test_latents_are_those_that_the_pipelines_encode(prepared, table, tiny_model):
    from aiprod_pipelines import encoding
    from aiprod_pipelines.components import ModelSet
    from aiprod_pipelines.progress import Progress

    models = ModelSet.open(str(tiny_model))
    frames = np.stack(list(media.read_frames(table[0].files["video"]))[:9])
    frames = np.stack([media.prepare_frame(frame, 32, 32) for frame in frames])
    with torch.inference_mode():
        expected = encoding.encode_frames(models, frames, Progress())
    rows = [json.loads(line) for line in (prepared / "clips.jsonl").read_text().splitlines()]
    part = load_file(prepared / f"part-{rows[0]['part']:05d}.safetensors")
    assert torch.equal(part["video"][:1], expected.half())


def test_the_report_shows_every_kept_clip_with_its_thumbnail(prepared):
    class Page(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open, self.images, self.text = [], [], ""

        def handle_starttag(self, tag, attributes):
            if tag == "img":
                self.images.append(dict(attributes)["src"])
            if tag not in ("img", "meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text += data

    page = Page()
    page.feed((prepared / "report.html").read_text())
    assert page.open == []
    assert len(page.images) == 6
    for source in page.images:
        with Image.open(prepared / source) as image:
            assert image.height >= 96
    assert "6 clips prepared" in page.text
    assert "damaged.mp4" in page.text and "the same picture and sound as good0.mp4" in page.text


def test_killed_twice_and_run_again_it_ends_with_the_same_bytes(
    prepared, footage, tiny_model, tmp_path
):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    command = ["dataset", "process-dataset", str(footage / "clips.jsonl"), "-o", str(out)]
    command += ["--model", str(tiny_model), "--resolution-buckets", "32x32x9;48x32x9"]
    command += ["--clips-per-part", "3"]
    for write in (5, 8):  # among the parts' latents, then among their texts
        ended = subprocess.run([sys.executable, str(script), str(write), *command], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert list(out.glob(".*.tmp"))
    assert 0 < len(list(out.glob("part-*.safetensors"))) <= 4
    assert not (out / "report.html").exists()
    process_dataset(read_clips(footage / "clips.jsonl"), out, Model(str(tiny_model)), SETTINGS)
    assert contents(out) == contents(prepared)


def test_workers_make_the_same_latents_as_one_process(prepared, table, tiny_model, tmp_path):
    out, run = tmp_path / "out", RunOptions(Workers(2))
    process_videos(table, out, Model(str(tiny_model)), SETTINGS, run)
    assert (out / "clips.jsonl").read_bytes() == (prepared / "clips.jsonl").read_bytes()
    for path in out.glob("part-*.safetensors"):
        expected = load_file(prepared / path.name)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())


def test_videos_and_then_captions_are_the_same_as_both_at_once(
    prepared, table, tiny_model, tmp_path
):
    out = tmp_path / "out"
    process_videos(table, out, Model(str(tiny_model)), SETTINGS)
    with pytest.raises(InputError, match="needs video or audio, and hidden"):
        LatentDataset(out, max_length=16)
    process_captions(table, out)
    assert contents(out) == contents(prepared)
    again = process_captions(table, out)
    assert again.encoded_parts == 0

    latents = load_file(out / "part-00000.safetensors")
    process_captions(table, out, lora_trigger="red")
    with_trigger = load_file(out / "part-00000.safetensors")
    assert torch.equal(with_trigger["video"], latents["video"])
    assert (with_trigger["lengths"] == latents["lengths"] + 1).all()
    assert json.loads((out / "part-00000.jsonl").read_text().splitlines()[0]) == [
        "red a red ball bounces"
    ]


def test_a_longer_table_adds_clips_and_a_shorter_one_drops_them(table, tiny_model, tmp_path):
    out, model = tmp_path / "out", Model(str(tiny_model))
    process_dataset(table[:2], out, model, SETTINGS)
    summary = process_dataset(table[:6], out, model, SETTINGS)
    assert (summary.count("kept"), summary.num_parts) == (6, 4)
    process_dataset(table[:2], out, model, SETTINGS)
    assert len(LatentDataset(out, max_length=16)) == 2
    assert len(list((out / "thumbnails").iterdir())) == 2


def test_references_and_masks_lie_on_the_grids_of_the_latents(footage, tiny_model, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = {"video": footage / "good0.mp4", "video_mask": tmp_path / "mask.png"}
    clip = Clip("good0.mp4", files, ("a ball", "a red ball"))
    settings = replace(
        SETTINGS, controls=("canny",), reference_downscale_factor=2,
        reference_temporal_scale_factor=2,
    )  # fmt: skip
    process_dataset([clip], tmp_path / "out", Model(str(tiny_model)), settings)
    part = load_file(tmp_path / "out/part-00000.safetensors")
    assert part["reference_latents"].shape == (1, 8, 2, 2, 2)
    assert part["video_masks"].shape == part["video"].shape[:1] + part["video"].shape[2:]
    assert part["video_masks"][0, :, :2].eq(1).all() and part["video_masks"][0, :, 2:].eq(0).all()
    assert len(part["lengths"]) == 2


def test_a_latent_is_given_only_where_all_that_it_covers_is():
    from aiprod_core.types import ScaleFactors

    mask = torch.ones(9, 16, 16, dtype=torch.bool)
    mask[5, 3, 12] = False
    expected = torch.ones(3, 2, 2, dtype=torch.bool)
    expected[2, 0, 1] = False
    assert torch.equal(mask_on_grid(mask, ScaleFactors(4, 8, 8)), expected)
    samples = torch.ones(1, 100)
    samples[0, 30] = 0
    assert mask_on_time(samples, 4).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (replace(SETTINGS, buckets=parse_buckets("32x30x9")), "bucket 32x30x9: height.*try 32"),
        (replace(SETTINGS, buckets=parse_buckets("32x32x8")), "bucket 32x32x8: num_frames.*try"),
        (replace(SETTINGS, reference_downscale_factor=3), "must be a multiple of 24"),
        (replace(SETTINGS, controls=("edges",)), "control must be one of canny"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    table, tiny_model, tmp_path, settings, message
):
    with pytest.raises(InputError, match=message):
        process_dataset(table, tmp_path / "out", Model(str(tiny_model)), settings)
    assert not (tmp_path / "out").exists()


def test_parts_that_others_made_are_left_alone(table, tiny_model, tmp_path):
    foreign = tmp_path / "part-00000.safetensors"
    foreign.write_bytes(b"theirs")
    with pytest.raises(InputError, match="did not make"):
        process_dataset(table, tmp_path, Model(str(tiny_model)), SETTINGS)
    assert foreign.read_bytes() == b"theirs"


def test_when_no_clip_can_be_used_it_says_why(footage, tiny_model, tmp_path):
    broken = [Clip("text.mp4", {"video": footage / "text.mp4"}, ("a ball",))]
    with pytest.raises(InputError, match=r"of 1 clips not one can be used.*text.mp4"):
        process_dataset(broken, tmp_path / "out", Model(str(tiny_model)), SETTINGS)


def test_damage_that_a_decoder_would_hide_is_found(footage):
    """One flipped byte: the decoder patches the picture and goes on."""
    data = bytearray((footage / "good1.mp4").read_bytes())
    start = data.find(b"mdat")
    found = 0
    for offset in range(900, 1500, 100):
        flipped = bytearray(data)
        flipped[start + offset] ^= 0xFF
        path = footage.parent / "flipped.mp4"
        path.write_bytes(flipped)
        try:
            verify(path)
        except InputError:
            found += 1
    assert found >= 4  # a flip may land where it changes nothing that is checked
