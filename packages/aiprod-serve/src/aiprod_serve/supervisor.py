"""Keeps a server alive: one web process, a worker a device, and the housekeeping.

The supervisor holds the listening socket, so that clients wait, and are not refused, while a web
process that died is made anew. What a dead worker held goes back to the queue at once.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
from sqlalchemy.exc import DBAPIError

from aiprod_core.errors import InputError
from aiprod_serve import webhooks
from aiprod_serve.database import Database
from aiprod_serve.files import Files
from aiprod_serve.jobs import JobStore
from aiprod_serve.security import list_keys
from aiprod_serve.settings import VARIABLE, Settings

if TYPE_CHECKING:
    from aiprod_serve.ray_app import Replicas

logger = logging.getLogger(__name__)

WATCH_S = 0.2
CHECKPOINT_S = 2.0
LEASES_S = 5.0
EXPIRY_S = 30.0
WEBHOOKS_S = 1.0
STOP_S = 30.0  # for a step to end and a job to be put back
BACKLOG = 1024
LONG_LIFE_S = 30.0
MAX_DELAY_S = 10.0


@dataclass
class Child:
    """A process to be kept running; `died` is told of each death."""

    name: str
    command: list[str]
    died: Callable[[], None]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    delay_s: float = 0.0  # before the next start; grows while it dies young


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.store = JobStore(
            self.database, keep_s=settings.keep_days * 86400, max_queue=settings.max_queue
        )
        self.files = Files(settings.data_dir)
        self.files.create_folders()
        self.files.keep_reserve()
        self.store.create_tables()
        if settings.is_public and not list_keys(self.database):
            raise InputError(
                f"{settings.host} can be reached by others and there is no API key; make one with "
                "`aiprod serve keys create NAME`, or listen on 127.0.0.1."
            )
        self.socket = _listen(settings)
        self.stopping = threading.Event()
        self.children = [self._web(), *(self._worker(i) for i in range(len(settings.devices)))]
        self.replicas: Replicas | None = None  # workers on a cluster, set by who deploys them

    @property
    def port(self) -> int:
        return self.socket.getsockname()[1]

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT, then puts running jobs back into the queue."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stopping.set())
        for work, every_s in (
            (self.database.checkpoint, CHECKPOINT_S),
            (self.store.requeue_expired, LEASES_S),
            (self._expire, EXPIRY_S),
            (self._send_webhooks, WEBHOOKS_S),
        ):
            threading.Thread(target=self._repeat, args=(work, every_s), daemon=True).start()
        try:
            while not self.stopping.is_set():
                for child in self.children:
                    self._tend(child)
                if self.replicas is not None:
                    self.replicas.tend()
                self.stopping.wait(WATCH_S)
        finally:
            self._stop_all()

    def _web(self) -> Child:
        command = [sys.executable, "-m", "aiprod_serve.app", str(self.socket.fileno())]
        return Child("web", command, lambda: self.store.count(web_restarts=1))

    def _worker(self, index: int) -> Child:
        device = self.settings.devices[index]
        name = f"{socket.gethostname()}/{self.port}/{index}"

        def died() -> None:
            self.store.release_worker(name)
            self.store.count(worker_restarts=1)

        return Child(name, [sys.executable, "-m", "aiprod_serve.worker", name, device], died)

    def _tend(self, child: Child) -> None:
        now = time.monotonic()
        if child.process is not None:
            if child.process.poll() is None:
                return
            logger.warning("%s ended with %s", child.name, child.process.returncode)
            child.process = None
            try:
                child.died()
            except DBAPIError as error:  # its lease will run out
                logger.warning("%s: %s", child.name, error.orig)
            lived_s = now - child.started
            child.delay_s = (
                0.0 if lived_s > LONG_LIFE_S else min(child.delay_s * 2 + 0.1, MAX_DELAY_S)
            )
            child.started = now
        if now - child.started >= child.delay_s or not child.started:
            child.started = now
            child.process = subprocess.Popen(
                child.command,
                env=os.environ | {VARIABLE: self.settings.to_json()},
                pass_fds=[self.socket.fileno()] if child.name == "web" else [],
                process_group=0,  # Ctrl-C reaches the supervisor alone
            )

    def _stop_all(self) -> None:
        running = [child.process for child in self.children if child.process is not None]
        for process in running:
            process.terminate()
        if self.replicas is not None:
            self.replicas.stop()
        deadline = time.monotonic() + STOP_S
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.socket.close()

    def _repeat(self, work: Callable[[], None], every_s: float) -> None:
        while not self.stopping.wait(every_s):
            try:
                work()
            except (DBAPIError, OSError) as error:
                logger.warning("%s: %s", getattr(work, "__name__", "housekeeping"), error)

    def _expire(self) -> None:
        self.files.keep_reserve()
        for job_id in self.store.expired(self.settings.keep_gb * 1e9):
            self.store.delete(job_id)
            self.files.remove(job_id)
        keep_uploads_s = self.settings.keep_uploads_hours * 3600
        self.files.sweep(self.store.all_ids(), keep_uploads_s=keep_uploads_s)

    def _send_webhooks(self) -> None:
        with httpx.Client(follow_redirects=False) as client:
            while webhooks.deliver_due(self.database, client) and not self.stopping.is_set():
                pass


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise InputError(
            f"{settings.host}:{settings.port}: cannot listen there ({error.strerror}); "
            "try another --port."
        ) from None
    return listening
