"""Tables of clips, buckets, parts of the preparation that need no network."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiprod_core.errors import InputError
from aiprod_trainer.dataset.clips import Bucket, choose_bucket, parse_buckets
from aiprod_trainer.dataset.journal import Journal, claim, sole_run
from aiprod_trainer.dataset.tables import read_clips, write_table
from aiprod_trainer.dataset.workers import Workers, run_tasks

ROWS = [
    {"video": "a.mp4", "caption": 'a "red" ball, bouncing'},
    {"video": "sub/b.mp4", "caption": "a blue ball\nrolls"},
]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_table_format_gives_back_the_rows_that_were_written(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    table = tmp_path / f"clips{suffix}"
    write_table(table, ROWS)
    clips = read_clips(table)
    assert [(clip.name, clip.captions) for clip in clips] == [
        (row["video"], (row["caption"],)) for row in ROWS
    ]
    assert clips[1].files["video"] == tmp_path / "sub/b.mp4"


def test_a_text_table_has_one_line_a_clip(tmp_path):
    write_table(tmp_path / "clips.txt", ROWS)
    assert [clip.captions[0] for clip in read_clips(tmp_path / "clips.txt")] == [
        'a "red" ball, bouncing',
        "a blue ball rolls",
    ]


def test_names_of_ltx_columns_and_several_captions_are_understood(tmp_path):
    row = {"media_path": "a.mp4", "ref_media_path": "edges.mp4", "caption": ["one", "two", ""]}
    (tmp_path / "clips.json").write_text(json.dumps([row]))
    [clip] = read_clips(tmp_path / "clips.json")
    assert clip.captions == ("one", "two")
    assert clip.files == {"video": tmp_path / "a.mp4", "reference_video": tmp_path / "edges.mp4"}


def test_a_folder_takes_captions_from_the_text_beside_each_clip(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "sub/a.MP4", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "sub/a.txt").write_text(" a ball \n")
    clips = read_clips(tmp_path)
    assert [(clip.name, clip.captions) for clip in clips] == [
        ("b.mp4", ()),
        ("sub/a.MP4", ("a ball",)),
    ]


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "clip,words\nx.mp4,y\n", {}, "no column video or audio"),
        ("a.csv", "video,caption\n,y\n", {}, "row 1: names neither"),
        ("a.csv", "video,caption\nx.mp4,y\n", {"video": "vidoe"}, "did you mean video"),
        ("a.jsonl", '{"video": "x.mp4"}\n{"video"', {}, "line 2: not valid JSON"),
        ("a.json", "[1]", {}, "must hold objects"),
        ("a.xlsx", "", {}, "a table must end in"),
        ("a.csv", "", {}, "no rows"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path, name, text, columns, message
):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_clips(tmp_path / name, columns)


def test_a_bucket_is_chosen_by_shape_then_length_then_size():
    buckets = parse_buckets("64x64x9; 64x64x25; 96x64x25; 64x96x25; 192x128x25")
    assert choose_bucket(buckets, 100, 100, 30) == Bucket(64, 64, 25)
    assert choose_bucket(buckets, 100, 100, 24) == Bucket(64, 64, 9)
    assert choose_bucket(buckets, 90, 60, 30) == Bucket(64, 96, 25)
    assert choose_bucket(buckets, 100, 150, 30) == Bucket(96, 64, 25)  # not enlarged
    assert choose_bucket(buckets, 1000, 1500, 30) == Bucket(192, 128, 25)
    assert choose_bucket(buckets, 100, 100, 8) is None


@given(st.integers(16, 4000), st.integers(16, 4000), st.integers(1, 400))
def test_a_chosen_bucket_is_never_longer_than_the_clip(height, width, num_frames):
    buckets = parse_buckets("64x64x25;96x64x49;64x96x121")
    bucket = choose_bucket(buckets, height, width, num_frames)
    assert (bucket is None) == (num_frames < 25)
    assert bucket is None or bucket.num_frames <= num_frames


@pytest.mark.parametrize("text", ["", "64x64", "64x64x0", "64x64x25;", "axbxc"])
def test_misspelt_buckets_are_refused_with_an_example(text):
    with pytest.raises(InputError, match="768x512x49"):
        parse_buckets(text)


def test_a_journal_drops_the_line_that_a_kill_cut_short(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.add("a", 1)
    journal.add("b", {"x": 2})
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'["c", {"x"')
    again = Journal(journal.path)
    assert again.records == {"a": 1, "b": {"x": 2}}
    assert journal.path.read_bytes() == whole


def test_a_folder_holds_later_runs_to_its_settings(tmp_path):
    claim(tmp_path / "dataset.json", {"fps": 12, "buckets": ["a"]})
    claim(tmp_path / "dataset.json", {"fps": 12, "buckets": ["a"]})
    with pytest.raises(InputError, match="fps 12 before, now 24"):
        claim(tmp_path / "dataset.json", {"fps": 24, "buckets": ["a"]})
    claim(tmp_path / "dataset.json", {"fps": 24, "buckets": ["a"]}, overwrite=True)


def test_one_run_at_a_time_works_in_a_folder_and_clears_half_written_files(tmp_path):
    leftover = tmp_path / ".part-00000.safetensors.1.tmp"
    leftover.write_text("half")
    with sole_run(tmp_path):
        assert not leftover.exists()
        with pytest.raises(InputError, match="another run"), sole_run(tmp_path):
            pass
    with sole_run(tmp_path):
        pass


def square_or_die(task: dict) -> int:
    if task["x"] == 3:
        os.abort()
    return task["x"] ** 2


def test_a_task_that_kills_its_process_costs_only_itself():
    tasks = [{"x": x} for x in range(6)]
    results = dict(run_tasks(square_or_die, tasks, Workers(2)))
    assert results == {0: 0, 1: 1, 2: 4, 3: None, 4: 16, 5: 25}


def sleep_in_worker(pids: Path) -> None:
    for _ in run_tasks(note_and_sleep, [{"folder": str(pids)}], Workers(1), isolated=True):
        pass


def note_and_sleep(task: dict) -> None:
    (Path(task["folder"]) / str(os.getpid())).touch()
    time.sleep(60)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    parent = context.Process(target=sleep_in_worker, args=(tmp_path,))
    parent.start()
    while not (started := list(tmp_path.iterdir())):
        time.sleep(0.05)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{started[0].name}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{started[0].name}").exists()


def square(task: dict) -> dict:
    if task["x"] == 99:
        raise InputError("x must not be 99.")
    return {"square": task["x"] ** 2, "list": [None, 1.5]}


def test_a_ray_cluster_gives_what_this_process_gives():
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    tasks = [{"x": x} for x in range(4)]
    try:
        found = dict(run_tasks(square, tasks, Workers(ray="local")))
        assert found == dict(run_tasks(square, tasks, Workers()))
        with pytest.raises(InputError, match="must not be 99"):
            list(run_tasks(square, [{"x": 99}], Workers(ray="local")))
    finally:
        ray.shutdown()


def test_random_crops_follow_the_clip_and_cover_the_spare_pixels():
    from aiprod_pipelines.media import prepare_frame
    from aiprod_trainer.dataset.clips import _place

    frame = np.zeros((10, 40, 3), np.uint8)
    frame[..., 0] = np.arange(40)
    lefts = [
        int(prepare_frame(frame, 10, 10, place=_place(f"{i}.mp4"))[0, 0, 0]) for i in range(200)
    ]
    assert min(lefts) <= 2 and max(lefts) >= 27
    assert prepare_frame(frame, 10, 10)[0, 0, 0] == 15
