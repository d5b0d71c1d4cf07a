"""The one database: SQLite in WAL mode beside the results, or whatever SQLAlchemy URL is given.

Web process, workers and supervisor each open it; nothing else is shared between them but files.
Times are Unix seconds. SQLite is synced at checkpoints (synchronous=NORMAL): a killed process loses
nothing, a power cut may lose the last moments.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

metadata = sa.MetaData()

# Pages of SQLite's log at which a commit moves them into the file and waits for the disk, which
# takes tens of milliseconds: about 80 MB, reached only where no supervisor does it before.
LOG_PAGES = 20_000


class Database:
    """Short transactions: `reading()` never waits for a writer, `writing()` is alone in SQLite."""

    def __init__(self, url: str) -> None:
        self.engine = _open(url)
        # SQLite lets a writer that has to wait look again after 1, 2, 5, ... 100 ms; the threads of
        # one process follow each other at once.
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._turn: AbstractContextManager = threading.Lock() if self.is_sqlite else nullcontext()

    def create_tables(self) -> None:
        metadata.create_all(self.engine)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection.execution_options(aiprod_reads=True)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with self._turn, self.engine.begin() as connection:
            yield connection

    def checkpoint(self) -> None:
        """Moves SQLite's log into its file, in the time of the caller and not of a request."""
        if self.is_sqlite:
            connection = self.engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
            finally:
                connection.close()


def sqlite_url(data_dir: Path) -> str:
    return f"sqlite:///{data_dir / 'jobs.sqlite3'}"


def _open(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return sa.create_engine(url, pool_pre_ping=True)
    # Every thread of the web process may hold one.
    engine = sa.create_engine(
        url, connect_args={"timeout": 30, "check_same_thread": False}, pool_size=40
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection, record) -> None:
        connection.isolation_level = None  # transactions are begun below
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # A deferred transaction that reads first and then writes fails when another got between.
        is_read = connection.get_execution_options().get("aiprod_reads", False)
        connection.exec_driver_sql("BEGIN" if is_read else "BEGIN IMMEDIATE")

    return engine
