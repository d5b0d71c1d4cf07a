"""Jobs: the one durable concept. A row says what to make, who makes it and how far it has come.

    queued -> in_progress -> completed | failed | cancelled
                  |  ^
                  v  | the worker died, or was stopped: its lease is taken back
                queued

A worker holds a job by (worker, attempt): both change when the job is claimed again, so nothing
that a worker says about a job it has lost is heard. Rows and files of finished jobs expire.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aiprod_serve import webhooks
from aiprod_serve.database import Database, metadata

ACTIVE = ("queued", "in_progress")
FINISHED = ("completed", "failed", "cancelled")

# A job that has taken this many workers down with it is not tried again.
MAX_CRASHES = 5

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("owner", sa.String(40), nullable=False),  # a key's id; empty without keys
    sa.Column("status", sa.String(12), nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("pipeline", sa.String(40), nullable=False),
    sa.Column("request", sa.Text, nullable=False),  # GenerationRequest.to_dict as JSON
    sa.Column("size", sa.String(20), nullable=False),  # WIDTHxHEIGHT of the file
    sa.Column("seconds", sa.Float, nullable=False),  # duration of the clip
    sa.Column("is_streamed", sa.Boolean, nullable=False),
    sa.Column("remixed_from", sa.String(40)),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("fingerprint", sa.String(64)),  # of the body that the idempotency key came with
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),  # of the last attempt
    sa.Column("finished_at", sa.Float),
    sa.Column("expires_at", sa.Float),
    sa.Column("progress", sa.Integer, nullable=False, default=0),  # percent
    sa.Column("stage", sa.String(40), nullable=False, default=""),
    sa.Column("num_previews", sa.Integer, nullable=False, default=0),
    sa.Column("error_code", sa.String(40)),
    sa.Column("error_message", sa.Text),
    sa.Column("worker", sa.String(100)),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("crashes", sa.Integer, nullable=False, default=0),
    sa.Column("lease_until", sa.Float),
    sa.Column("is_cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False, default=0),  # of the result's files
    sa.Column("timings", sa.Text),  # seconds by stage as JSON
    sa.UniqueConstraint("owner", "idempotency_key"),
    sa.Index("jobs_by_status", "status", "created_at", "id"),
    sa.Index("jobs_by_owner", "owner", "created_at", "id"),
)

# Rows expire; these sums do not. Prometheus reads them.
counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
)
COUNTERS = (
    "submitted", "completed", "failed", "cancelled", "interrupted", "generation_seconds",
    "worker_restarts", "web_restarts",
)  # fmt: skip

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("device", sa.String(20), nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("job", sa.String(40)),
)

# What every request asks, built once: SQLAlchemy needs longer to put a statement together than
# SQLite to run it.
_TAKE_TURN = (  # in PostgreSQL the locked row makes submissions follow one another
    sa.select(counters.c.value).where(counters.c.name == "submitted").with_for_update()
)
_INSERT = jobs.insert().returning(jobs)
_GET = sa.select(jobs).where(jobs.c.id == sa.bindparam("job_id"))
_NUM_QUEUED = sa.select(sa.func.count()).where(jobs.c.status == "queued")
_NUM_BEFORE = _NUM_QUEUED.where(jobs.c.created_at < sa.bindparam("created_at"))
_COUNT = (
    counters.update()
    .where(counters.c.name == sa.bindparam("counter"))
    .values(value=counters.c.value + sa.bindparam("amount"))
)


@dataclass(frozen=True)
class NewJob:
    """What is submitted, checked already."""

    owner: str
    model: str
    pipeline: str
    request: dict[str, Any]
    size: str
    seconds: float
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    is_streamed: bool = False
    remixed_from: str | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Job:
    """A row as it was when it was read."""

    id: str
    owner: str
    status: str
    model: str
    pipeline: str
    request: dict[str, Any]
    size: str
    seconds: float
    is_streamed: bool
    remixed_from: str | None
    idempotency_key: str | None
    fingerprint: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    progress: int
    stage: str
    num_previews: int
    error_code: str | None
    error_message: str | None
    worker: str | None
    attempt: int
    crashes: int
    lease_until: float | None
    is_cancel_requested: bool
    num_bytes: int
    timings: dict[str, float]

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED

    @classmethod
    def from_row(cls, row: Any) -> "Job":
        values = dict(row._mapping)
        values["request"] = json.loads(values["request"])
        values["timings"] = json.loads(values["timings"] or "{}")
        return cls(**values)


class Standing(Enum):
    """What a worker learns about the job that it works on."""

    KEPT = "kept"
    CANCELLED = "cancelled"
    LOST = "lost"  # deleted, or claimed by another after the lease ran out


class QueueFullError(Exception):
    """As many jobs wait as may."""


class IdempotencyError(Exception):
    """The idempotency key came before, with another request."""


class JobStore:
    """All that is done with jobs; every method is one transaction."""

    def __init__(self, database: Database, *, keep_s: float, max_queue: int) -> None:
        self.database, self.keep_s, self.max_queue = database, keep_s, max_queue

    def create_tables(self) -> None:
        self.database.create_tables()
        with self.database.writing() as connection:
            known = set(connection.scalars(sa.select(counters.c.name)))
            new = [{"name": name, "value": 0.0} for name in COUNTERS if name not in known]
            if new:
                connection.execute(counters.insert(), new)

    # For clients.

    def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Queues a job; or returns the one that its idempotency key made before, and False.

        Raises QueueFullError and IdempotencyError.
        """
        values = {name: getattr(new, name) for name in new.__dataclass_fields__}
        values["request"] = json.dumps(new.request)
        with self.database.writing() as connection:
            connection.execute(_TAKE_TURN)
            if new.idempotency_key is not None:
                earlier = self._find_by_key(connection, new.owner, new.idempotency_key)
                if earlier is not None:
                    if earlier.fingerprint != new.fingerprint:
                        raise IdempotencyError
                    return earlier, False
            self._check_queue(connection)
            _count(connection, submitted=1)
            values |= {"status": "queued", "created_at": time.time()}
            return Job.from_row(connection.execute(_INSERT, values).one()), True

    def find_by_key(self, owner: str, idempotency_key: str) -> Job | None:
        with self.database.reading() as connection:
            return self._find_by_key(connection, owner, idempotency_key)

    def check_queue(self) -> None:
        """Raises QueueFullError; asked before an upload is looked at."""
        with self.database.reading() as connection:
            self._check_queue(connection)

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job, if it is the owner's; None as owner sees all."""
        with self.database.reading() as connection:
            row = connection.execute(_GET, {"job_id": job_id}).one_or_none()
            is_theirs = row is not None and owner in (None, row.owner)
            return Job.from_row(row) if is_theirs else None

    def page(
        self,
        owner: str | None,
        *,
        limit: int,
        after: str | None = None,
        is_newest_first: bool = True,
    ) -> list[Job] | None:
        """A page of jobs in order of creation, after the job `after`; None if there is none."""
        age = sa.tuple_(jobs.c.created_at, jobs.c.id)
        query = sa.select(jobs)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        with self.database.reading() as connection:
            if after is not None:
                cursor = connection.execute(
                    sa.select(jobs.c.created_at, jobs.c.id).where(*_mine(after, owner))
                ).one_or_none()
                if cursor is None:
                    return None
                place = sa.tuple_(sa.literal(cursor.created_at), sa.literal(cursor.id))
                query = query.where(age < place if is_newest_first else age > place)
            order = [jobs.c.created_at, jobs.c.id]
            query = query.order_by(
                *(column.desc() if is_newest_first else column for column in order)
            )
            return [Job.from_row(row) for row in connection.execute(query.limit(limit))]

    def cancel(self, job_id: str, owner: str | None = None) -> Job | None:
        """Cancels a queued job at once, and asks the worker of a running one to stop."""
        mine = _mine(job_id, owner)
        with self.database.writing() as connection:
            self._finish(connection, [*mine, jobs.c.status == "queued"], "cancelled")
            connection.execute(
                jobs.update()
                .where(*mine, jobs.c.status == "in_progress")
                .values(is_cancel_requested=True)
            )
            row = connection.execute(sa.select(jobs).where(*mine)).one_or_none()
            return None if row is None else Job.from_row(row)

    def delete(self, job_id: str, owner: str | None = None) -> bool:
        """Removes the row; a worker on it stops as for a cancelled one. Files are the caller's."""
        with self.database.writing() as connection:
            return connection.execute(jobs.delete().where(*_mine(job_id, owner))).rowcount > 0

    def place_in_queue(self, job: Job) -> int:
        """How many jobs will be begun before this one."""
        with self.database.reading() as connection:
            return connection.scalar(_NUM_BEFORE, {"created_at": job.created_at}) or 0

    # For workers.

    def claim(self, worker: str, models: Sequence[str], *, lease_s: float) -> Job | None:
        """Takes the oldest queued job of the models, or None. No two workers get the same."""
        waiting = (
            sa.select(jobs.c.id)
            .where(jobs.c.status == "queued", jobs.c.model.in_(models))
            .order_by(jobs.c.created_at, jobs.c.id)
            .limit(1)
        )
        with self.database.reading() as connection:  # an idle worker holds nobody up
            if connection.scalar(waiting) is None:
                return None
        now = time.time()
        with self.database.writing() as connection:
            row = connection.execute(
                jobs.update()
                # Skipping locked rows is PostgreSQL's; in SQLite a writer is alone.
                .where(jobs.c.id == waiting.with_for_update(skip_locked=True).scalar_subquery())
                .values(
                    status="in_progress",
                    worker=worker,
                    attempt=jobs.c.attempt + 1,
                    started_at=now,
                    lease_until=now + lease_s,
                    progress=0,
                    stage="",
                    num_previews=0,
                )
                .returning(jobs)
            ).one_or_none()
            return None if row is None else Job.from_row(row)

    def heartbeat(
        self, job: Job, *, progress: int, stage: str, num_previews: int, lease_s: float
    ) -> Standing:
        """Keeps the lease and tells how far the job is; returns whether to go on."""
        with self.database.writing() as connection:
            row = connection.execute(
                jobs.update()
                .where(*_held(job))
                .values(
                    lease_until=time.time() + lease_s,
                    progress=progress,
                    stage=stage,
                    num_previews=num_previews,
                )
                .returning(jobs.c.is_cancel_requested)
            ).one_or_none()
        if row is None:
            return Standing.LOST
        return Standing.CANCELLED if row.is_cancel_requested else Standing.KEPT

    def complete(self, job: Job, *, num_bytes: int, timings: dict[str, float]) -> bool:
        """Makes the result visible. False if the job is not the worker's any more."""
        with self.database.writing() as connection:
            return self._finish(
                connection,
                _held(job),
                "completed",
                progress=100,
                stage="",
                num_bytes=num_bytes,
                timings=json.dumps(timings),
                generation_s=timings.get("total", 0.0),
            )

    def fail(self, job: Job, code: str, message: str) -> bool:
        with self.database.writing() as connection:
            return self._finish(
                connection, _held(job), "failed", error_code=code, error_message=message[:2000]
            )

    def acknowledge_cancel(self, job: Job) -> bool:
        with self.database.writing() as connection:
            return self._finish(connection, _held(job), "cancelled")

    def release(self, job: Job) -> None:
        """Puts a job back that is not to blame: its worker is asked to stop."""
        with self.database.writing() as connection:
            self._requeue(connection, _held(job), is_crash=False)

    def register_worker(self, name: str, device: str) -> None:
        """Announces a worker and takes back what one of the same name left when it died."""
        with self.database.writing() as connection:
            connection.execute(workers.delete().where(workers.c.name == name))
            connection.execute(
                workers.insert().values(name=name, device=device, seen_at=time.time())
            )
            self._requeue(connection, [jobs.c.worker == name], is_crash=True)

    def see_worker(self, name: str, job: str | None) -> None:
        with self.database.writing() as connection:
            query = workers.update().where(workers.c.name == name)
            connection.execute(query.values(seen_at=time.time(), job=job))

    # For the supervisor.

    def release_worker(self, name: str) -> None:
        """Takes back what a worker held that is known to be dead."""
        with self.database.writing() as connection:
            connection.execute(workers.delete().where(workers.c.name == name))
            self._requeue(connection, [jobs.c.worker == name], is_crash=True)

    def release_workers(self, prefix: str) -> None:
        """Puts back what all workers whose names begin so hold: they are asked to stop."""
        with self.database.writing() as connection:
            is_one = workers.c.name.startswith(prefix, autoescape=True)
            connection.execute(workers.delete().where(is_one))
            held = [jobs.c.worker.startswith(prefix, autoescape=True)]
            self._requeue(connection, held, is_crash=False)

    def num_open(self, models: Sequence[str], prefix: str) -> int:
        """Jobs of the models that wait, and those that workers whose names begin so are making."""
        is_theirs = jobs.c.worker.startswith(prefix, autoescape=True)
        query = sa.select(sa.func.count()).where(
            jobs.c.model.in_(models),
            sa.or_(jobs.c.status == "queued", sa.and_(jobs.c.status == "in_progress", is_theirs)),
        )
        with self.database.reading() as connection:
            return connection.scalar(query) or 0

    def requeue_expired(self) -> None:
        """Takes back jobs whose worker has not been heard of for the length of its lease."""
        with self.database.writing() as connection:
            self._requeue(connection, [jobs.c.lease_until < time.time()], is_crash=True)

    def expired(self, keep_bytes: float) -> list[str]:
        """Finished jobs past their age, and the oldest above the total size."""
        finished = jobs.c.status.in_(FINISHED)
        newest_first = [jobs.c.finished_at.desc(), jobs.c.id]
        total = sa.func.sum(jobs.c.num_bytes).over(order_by=newest_first).label("total")
        sized = sa.select(jobs.c.id, jobs.c.expires_at, jobs.c.num_bytes, total).where(finished)
        table = sized.subquery()
        is_too_much = sa.and_(table.c.num_bytes > 0, table.c.total > keep_bytes)
        query = sa.select(table.c.id).where(sa.or_(table.c.expires_at < time.time(), is_too_much))
        with self.database.reading() as connection:
            return list(connection.scalars(query))

    def all_ids(self) -> set[str]:
        with self.database.reading() as connection:
            return set(connection.scalars(sa.select(jobs.c.id)))

    def count(self, **amounts: float) -> None:
        with self.database.writing() as connection:
            _count(connection, **amounts)

    # For health and metrics.

    def live_workers(self, within_s: float) -> list[dict[str, Any]]:
        """Workers that were heard of lately."""
        query = sa.select(workers).where(workers.c.seen_at > time.time() - within_s)
        with self.database.reading() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def statistics(self) -> dict[str, Any]:
        """Jobs by status, the age of the oldest queued one, and the counters."""
        by_status = sa.select(jobs.c.status, sa.func.count().label("count")).group_by(jobs.c.status)
        oldest = sa.select(sa.func.min(jobs.c.created_at)).where(jobs.c.status == "queued")
        with self.database.reading() as connection:
            numbers = {row.status: row._mapping["count"] for row in connection.execute(by_status)}
            waiting_since = connection.scalar(oldest)
            sums = {row.name: row.value for row in connection.execute(sa.select(counters))}
            stored = connection.scalar(sa.select(sa.func.sum(jobs.c.num_bytes))) or 0
        return {
            "jobs": {status: numbers.get(status, 0) for status in (*ACTIVE, *FINISHED)},
            "oldest_queued_s": time.time() - waiting_since if waiting_since else 0.0,
            "stored_bytes": stored,
            "counters": sums,
        }

    # Parts.

    def _find_by_key(self, connection: Connection, owner: str, key: str) -> Job | None:
        query = sa.select(jobs).where(jobs.c.owner == owner, jobs.c.idempotency_key == key)
        row = connection.execute(query).one_or_none()
        return None if row is None else Job.from_row(row)

    def _check_queue(self, connection: Connection) -> None:
        if (connection.scalar(_NUM_QUEUED) or 0) >= self.max_queue:
            raise QueueFullError

    def _finish(
        self,
        connection: Connection,
        where: list[Any],
        status: str,
        *,
        generation_s: float = 0.0,
        **values: Any,
    ) -> bool:
        now = time.time()
        row = connection.execute(
            jobs.update()
            .where(*where)
            .values(
                status=status,
                finished_at=now,
                expires_at=now + self.keep_s,
                lease_until=None,
                **values,
            )
            .returning(jobs)
        ).one_or_none()
        if row is None:
            return False
        _count(connection, **{status: 1}, generation_seconds=generation_s)
        # In the same transaction, so that an event is sent if and only if it happened.
        webhooks.enqueue(connection, f"video.{status}", row.id, row.owner)
        return True

    def _requeue(self, connection: Connection, where: list[Any], *, is_crash: bool) -> None:
        where = [*where, jobs.c.status == "in_progress"]
        if is_crash:
            self._finish_all(connection, where)
        count = connection.execute(
            jobs.update()
            .where(*where)
            .values(
                status="queued",
                worker=None,
                lease_until=None,
                progress=0,
                stage="",
                crashes=jobs.c.crashes + (1 if is_crash else 0),
            )
        ).rowcount
        if is_crash and count:
            _count(connection, interrupted=count)

    def _finish_all(self, connection: Connection, where: list[Any]) -> None:
        """Of the jobs that lost their worker, those that are not to run again."""
        query = sa.select(jobs.c.id, jobs.c.is_cancel_requested).where(
            *where, sa.or_(jobs.c.is_cancel_requested, jobs.c.crashes + 1 >= MAX_CRASHES)
        )
        for row in connection.execute(query).all():
            mine = [jobs.c.id == row.id]
            if row.is_cancel_requested:
                self._finish(connection, mine, "cancelled")
            else:
                message = f"the worker died {MAX_CRASHES} times while it made this clip"
                self._finish(
                    connection, mine, "failed", error_code="worker_lost", error_message=message
                )


def _mine(job_id: str, owner: str | None) -> list[Any]:
    return [jobs.c.id == job_id] + ([] if owner is None else [jobs.c.owner == owner])


def _held(job: Job) -> list[Any]:
    return [
        jobs.c.id == job.id,
        jobs.c.status == "in_progress",
        jobs.c.worker == job.worker,
        jobs.c.attempt == job.attempt,
    ]


def _count(connection: Connection, **amounts: float) -> None:
    for name, amount in amounts.items():
        if amount:
            connection.execute(_COUNT, {"counter": name, "amount": amount})
