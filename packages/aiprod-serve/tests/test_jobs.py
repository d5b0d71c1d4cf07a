"""The store: no job is lost, none is given out twice, whoever dies."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiprod_serve.database import Database, metadata
from aiprod_serve.jobs import (
    MAX_CRASHES,
    IdempotencyError,
    Job,
    JobStore,
    NewJob,
    QueueFullError,
    Standing,
)

New = Callable[..., NewJob]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        yield Database(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
        return
    made = Database(request.getfixturevalue("postgresql_url"))
    yield made
    metadata.drop_all(made.engine)
    made.engine.dispose()


@pytest.fixture
def store(database: Database) -> JobStore:
    made = JobStore(database, keep_s=100, max_queue=500)
    made.create_tables()
    return made


def claim(store: JobStore, worker: str = "w", lease_s: float = 30) -> Job:
    job = store.claim(worker, ["tiny"], lease_s=lease_s)
    assert job is not None
    return job


def beat(store: JobStore, job: Job) -> Standing:
    return store.heartbeat(job, progress=50, stage="denoise", num_previews=0, lease_s=30)


def test_jobs_are_begun_in_the_order_in_which_they_came(store: JobStore, new_job: New):
    submitted = [store.submit(new_job())[0].id for _ in range(5)]
    assert [claim(store).id for _ in range(5)] == submitted
    assert store.claim("w", ["tiny"], lease_s=1) is None


def test_a_worker_gets_only_jobs_of_models_that_it_serves(store: JobStore, new_job: New):
    store.submit(new_job(model="other"))
    assert store.claim("w", ["tiny"], lease_s=1) is None


def test_workers_that_race_never_get_the_same_job(store: JobStore, new_job: New):
    submitted = {store.submit(new_job())[0].id for _ in range(60)}
    claimed: list[str] = []

    def work(name: str) -> None:
        while (job := store.claim(name, ["tiny"], lease_s=30)) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 60 and set(claimed) == submitted


def test_clients_that_race_with_one_idempotency_key_make_one_job(store: JobStore, new_job: New):
    made: list[str] = []

    def submit() -> None:
        made.append(store.submit(new_job(idempotency_key="k", fingerprint="f"))[0].id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1
    with pytest.raises(IdempotencyError):
        store.submit(new_job(idempotency_key="k", fingerprint="g"))
    other, is_new = store.submit(new_job(owner="b", idempotency_key="k", fingerprint="g"))
    assert is_new and other.id not in made


def test_the_queue_is_bounded_and_running_jobs_do_not_count(database: Database, new_job: New):
    store = JobStore(database, keep_s=1, max_queue=2)
    store.create_tables()
    store.submit(new_job())
    store.submit(new_job())
    with pytest.raises(QueueFullError):
        store.submit(new_job())
    claim(store)
    store.submit(new_job())


def test_clients_that_race_never_fill_the_queue_above_its_bound(store: JobStore, new_job: New):
    store.max_queue = 5
    refused: list[bool] = []

    def submit() -> None:
        for _ in range(4):
            try:
                store.submit(new_job())
            except QueueFullError:
                refused.append(True)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = store.statistics()
    assert numbers["jobs"]["queued"] == numbers["counters"]["submitted"] == 5
    assert len(refused) == 27


def test_no_request_waits_until_the_log_is_moved_to_the_disk(tmp_path: Path, new_job: New):
    path = tmp_path / "jobs.sqlite3"
    store = JobStore(Database(f"sqlite:///{path}"), keep_s=1, max_queue=1000)
    store.create_tables()
    store.database.checkpoint()
    size = path.stat().st_size
    log = path.with_name("jobs.sqlite3-wal")
    while log.stat().st_size < 6 * 2**20:  # SQLite would move it at 4 MB
        store.submit(new_job())
    assert path.stat().st_size == size
    store.database.checkpoint()
    assert path.stat().st_size > size


def test_the_job_of_a_dead_worker_is_begun_again_and_the_dead_is_not_heard(
    store: JobStore, new_job: New
):
    store.submit(new_job())
    first = claim(store, "a")
    store.release_worker("a")
    second = claim(store, "b")
    assert (second.id, second.attempt, second.crashes) == (first.id, 2, 1)
    assert beat(store, first) is Standing.LOST
    assert not store.complete(first, num_bytes=1, timings={})
    assert not store.fail(first, "x", "y")
    assert store.complete(second, num_bytes=1, timings={})
    assert not store.complete(second, num_bytes=1, timings={})


def test_the_same_name_after_a_restart_is_another_attempt(store: JobStore, new_job: New):
    store.submit(new_job())
    first = claim(store, "a")
    store.register_worker("a", "cpu")
    second = claim(store, "a")
    assert beat(store, first) is Standing.LOST and beat(store, second) is Standing.KEPT


def test_a_lease_that_runs_out_gives_the_job_back_and_a_heartbeat_keeps_it(
    store: JobStore, new_job: New
):
    store.submit(new_job())
    job = claim(store, "a", lease_s=0.05)
    beat(store, job)
    time.sleep(0.06)
    store.requeue_expired()
    assert beat(store, job) is Standing.KEPT
    store.heartbeat(job, progress=1, stage="", num_previews=0, lease_s=-1)
    store.requeue_expired()
    assert beat(store, job) is Standing.LOST
    assert claim(store, "b").id == job.id


def test_a_job_that_kills_every_worker_fails_in_the_end(store: JobStore, new_job: New):
    new, _ = store.submit(new_job())
    for _ in range(MAX_CRASHES):
        claim(store, "a")
        store.release_worker("a")
    job = store.get(new.id)
    assert job is not None and (job.status, job.error_code) == ("failed", "worker_lost")


def test_a_stopped_workers_job_goes_back_without_blame(store: JobStore, new_job: New):
    store.submit(new_job())
    for _ in range(2 * MAX_CRASHES):
        store.release(claim(store))
    assert claim(store).crashes == 0


def test_a_running_job_hears_of_its_cancelling_and_of_its_deletion(store: JobStore, new_job: New):
    first = store.submit(new_job())[0].id
    second = store.submit(new_job())[0].id
    cancelled, deleted = claim(store), claim(store)
    assert store.cancel(first) is not None
    assert store.delete(second)
    assert beat(store, cancelled) is Standing.CANCELLED
    assert beat(store, deleted) is Standing.LOST
    assert store.acknowledge_cancel(cancelled)
    job = store.get(first)
    assert job is not None and job.status == "cancelled"


def test_a_cancelled_job_whose_worker_dies_is_not_begun_again(store: JobStore, new_job: New):
    new, _ = store.submit(new_job())
    claim(store, "a")
    store.cancel(new.id)
    store.release_worker("a")
    job = store.get(new.id)
    assert job is not None and job.status == "cancelled"


def test_results_expire_by_age_and_the_oldest_by_total_size(database: Database, new_job: New):
    old = JobStore(database, keep_s=-1, max_queue=10)
    store = JobStore(database, keep_s=100, max_queue=10)
    store.create_tables()
    ids = [store.submit(new_job())[0].id for _ in range(5)]
    old.complete(claim(store), num_bytes=10, timings={})
    for _ in range(3):
        store.complete(claim(store), num_bytes=10, timings={})
        time.sleep(0.002)
    assert store.expired(keep_bytes=1000) == [ids[0]]
    assert set(store.expired(keep_bytes=25)) == {ids[0], ids[1]}
    assert ids[4] not in store.expired(keep_bytes=0)  # it is not finished


def test_owners_see_and_touch_only_their_own(store: JobStore, new_job: New):
    mine = store.submit(new_job(owner="a"))[0].id
    assert store.get(mine, "b") is None and store.get(mine, "a") is not None
    assert store.cancel(mine, "b") is None and not store.delete(mine, "b")
    assert store.page("b", limit=10) == [] and store.page("b", limit=10, after=mine) is None
    assert [job.id for job in store.page("a", limit=10) or []] == [mine]


def test_counters_outlive_the_rows(store: JobStore, new_job: New):
    new, _ = store.submit(new_job())
    store.complete(claim(store), num_bytes=7, timings={"total": 2.5})
    assert store.statistics()["stored_bytes"] == 7
    store.delete(new.id)
    numbers = store.statistics()
    assert numbers["jobs"]["completed"] == 0
    sums = numbers["counters"]
    assert (sums["submitted"], sums["completed"], sums["generation_seconds"]) == (1, 1, 2.5)


def test_of_all_workers_of_one_server_the_open_jobs_are_counted_and_given_back(
    store: JobStore, new_job: New
):
    for _ in range(4):
        store.submit(new_job())
    store.submit(new_job(model="other"))
    mine, other, like = claim(store, "host/1/a"), claim(store, "host/2/a"), claim(store, "host_1/")
    assert store.num_open(["tiny"], "host/1/") == 2  # one waits, one is made here
    store.release_workers("host/1/")
    standings = [beat(store, job) for job in (mine, other, like)]
    assert standings == [Standing.LOST, Standing.KEPT, Standing.KEPT]
    again = store.get(mine.id)
    assert again is not None and (again.status, again.crashes) == ("queued", 0)
