"""The worker: where it goes on after a death, how soon it stops, what a full disk does."""

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_pipelines.recipe import read_recipe
from aiprod_serve import worker as workers
from aiprod_serve.files import THUMBNAIL, VIDEO
from aiprod_serve.jobs import Job, JobStore, NewJob
from aiprod_serve.settings import Settings
from aiprod_serve.worker import Worker, explain

New = Callable[..., NewJob]


@pytest.fixture
def idle(settings: Settings, client: TestClient, loaded_models) -> Worker:
    """A worker that works when it is told to; the client's app has made the folders."""
    made = Worker(settings, "idle/0", "cpu")
    made._models = loaded_models
    made.store.register_worker("idle/0", "cpu")
    return made


def work_once(worker: Worker) -> Job:
    job = worker.store.claim(worker.name, ["tiny"], lease_s=30)
    assert job is not None
    worker.work_on(job)
    done = worker.store.get(job.id)
    assert done is not None
    return done


def test_a_job_whose_worker_died_while_decoding_is_decoded_and_not_denoised_again(
    idle: Worker, store: JobStore, new_job: New, monkeypatch: pytest.MonkeyPatch
):
    def die(*_: object, **__: object) -> None:
        raise SystemExit

    new, _ = store.submit(new_job())
    monkeypatch.setattr(workers, "write", die)
    job = store.claim("idle/0", ["tiny"], lease_s=30)
    assert job is not None
    with pytest.raises(SystemExit):
        idle.work_on(job)
    monkeypatch.undo()
    monkeypatch.chdir(idle.settings.data_dir)
    assert idle.files.latents(new.id).is_file()
    assert list((idle.files.root / "results").iterdir()) == []

    done = work_once(idle)
    assert done.status == "completed" and done.attempt == 2
    assert "denoise" not in done.timings and "decode video" in done.timings
    assert not idle.files.latents(new.id).exists()
    again, _ = store.submit(new_job())
    fresh = work_once(idle)
    assert fresh.id == again.id and "denoise" in fresh.timings
    hashes = [
        read_recipe(idle.files.result(result) / VIDEO)["latents_sha256"] for result in (done, fresh)
    ]
    assert hashes[0] == hashes[1]


def test_a_given_sound_survives_the_way_over_saved_latents(
    idle: Worker, store: JobStore, new_job: New, family, monkeypatch: pytest.MonkeyPatch
):
    new = new_job()
    folder = idle.files.inputs(new.id)
    folder.mkdir()
    media.write_audio(folder / "tone.wav", family.tone(0.75))
    request = new.request | {"audio": f"inputs/{new.id}/tone.wav"}
    store.submit(replace(new, request=request))
    monkeypatch.setattr(workers, "write", lambda *a, **k: (_ for _ in ()).throw(SystemExit))
    job = store.claim("idle/0", ["tiny"], lease_s=30)
    assert job is not None
    with pytest.raises(SystemExit):
        idle.work_on(job)
    monkeypatch.undo()
    monkeypatch.chdir(idle.settings.data_dir)
    done = work_once(idle)
    ours = media.read_audio(idle.files.result(done) / VIDEO).samples[0]
    theirs = media.read_audio(folder / "tone.wav").samples[0]
    length = min(len(ours), len(theirs))
    # AAC is not exact; another sound would not correlate.
    assert np.corrcoef(ours[:length], theirs[:length])[0, 1] > 0.95


def test_a_cancelled_job_stops_after_the_step_it_is_in(
    client: TestClient, settings: Settings, store: JobStore, new_job: New
):
    request = new_job().request | {"num_inference_steps": 5000}
    new, _ = store.submit(new_job(request=request))
    worker = Worker(settings, "w/0", "cpu")
    thread = threading.Thread(target=worker.run)
    thread.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = store.get(new.id)
        assert job is not None
        if job.stage == "denoise":
            break
        time.sleep(0.02)
    asked = time.monotonic()
    assert client.post(f"/v1/videos/{new.id}/cancel").json()["status"] == "in_progress"
    while (job := store.get(new.id)) is not None and not job.is_finished:
        assert time.monotonic() - asked < 30
        time.sleep(0.02)
    assert job is not None and job.status == "cancelled"
    assert list((worker.files.root / "work").iterdir()) == []
    worker.stop()
    thread.join()


def test_a_job_that_is_deleted_while_it_runs_leaves_nothing(
    idle: Worker, store: JobStore, new_job: New, client: TestClient, monkeypatch: pytest.MonkeyPatch
):
    new, _ = store.submit(new_job())
    make = workers.make_stills

    def delete_then_make(*arguments) -> None:
        make(*arguments)
        assert client.delete(f"/v1/videos/{new.id}").json()["deleted"]

    monkeypatch.setattr(workers, "make_stills", delete_then_make)
    job = store.claim("idle/0", ["tiny"], lease_s=30)
    assert job is not None
    idle.work_on(job)
    assert store.get(new.id) is None
    assert list((idle.files.root / "results").iterdir()) == []
    assert list((idle.files.root / "work").iterdir()) == []


def test_a_job_that_is_deleted_while_it_is_written_is_no_error(
    idle: Worker,
    store: JobStore,
    new_job: New,
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    new, _ = store.submit(new_job())
    write = workers.write

    def delete_then_write(*arguments, **options) -> None:
        assert client.delete(f"/v1/videos/{new.id}").json()["deleted"]
        write(*arguments, **options)

    monkeypatch.setattr(workers, "write", delete_then_write)
    job = store.claim("idle/0", ["tiny"], lease_s=30)
    assert job is not None
    idle.work_on(job)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    for folder in ("work", "latents", "results"):
        assert list((idle.files.root / folder).iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(idle.settings.data_dir)
    store.submit(new_job())
    assert work_once(idle).status == "completed"


def test_a_result_is_whole_when_the_job_is_completed(idle: Worker, store: JobStore, new_job: New):
    store.submit(new_job())
    done = work_once(idle)
    files = {path.name: path.stat().st_size for path in idle.files.result(done).iterdir()}
    assert files.keys() == {VIDEO, THUMBNAIL, "spritesheet.jpg"}
    assert sum(files.values()) == done.num_bytes


def test_a_full_disk_fails_the_job_with_that_reason_and_the_next_is_made(
    idle: Worker, store: JobStore, new_job: New, monkeypatch: pytest.MonkeyPatch
):
    def no_space(*_: object, **__: object) -> None:
        raise InputError("video.mp4: cannot be written") from OSError(errno.ENOSPC, "full")

    store.submit(new_job())
    monkeypatch.setattr(workers, "write", no_space)
    failed = work_once(idle)
    assert (failed.status, failed.error_code) == ("failed", "disk_full")
    assert list((idle.files.root / "work").iterdir()) == []
    assert list((idle.files.root / "latents").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(idle.settings.data_dir)
    store.submit(new_job())
    assert work_once(idle).status == "completed"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out_of_memory"),
        (InputError("width must be a multiple of 8"), "invalid_request"),
        (ZeroDivisionError("secret"), "internal_error"),
    ],
)
def test_failures_are_told_by_a_code_without_inner_details(error: Exception, code: str):
    assert explain(error)[0] == code
    assert "secret" not in explain(error)[1]


def test_a_stream_grows_while_it_is_made_and_is_the_result(
    idle: Worker, store: JobStore, new_job: New, tmp_path: Path
):
    new, _ = store.submit(new_job(is_streamed=True))
    done = work_once(idle)
    info = media.probe(idle.files.result(done) / VIDEO)
    assert done.id == new.id and info.num_frames == 9 and info.audio_codec == "aac"
    assert b"moof" in (idle.files.result(done) / VIDEO).read_bytes()
