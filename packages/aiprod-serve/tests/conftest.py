"""A server on a tiny random model: the real worker in a thread, the real app behind a test client.

The model is that of the pipelines' tests, made by their own code.
"""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from aiprod_pipelines.components import ModelSet
from aiprod_serve.app import create_app
from aiprod_serve.database import Database
from aiprod_serve.jobs import JobStore, NewJob
from aiprod_serve.settings import Settings
from aiprod_serve.worker import Worker

PIPELINES_TESTS = Path(__file__).resolve().parents[2] / "aiprod-pipelines" / "tests"
PROMPT = "a red ball bounces"


def load_family() -> ModuleType:
    """The conftest of the pipelines' tests, which writes tiny models."""
    spec = importlib.util.spec_from_file_location("tiny_family", PIPELINES_TESTS / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def family() -> ModuleType:
    return load_family()


@pytest.fixture(scope="session")
def tiny_model(family: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    family.save_tiny_lora(folder / "tiny-lora-camera-control-dolly-in.safetensors")
    return family.save_tiny_model(folder)


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)  # as every process of a server does
    return Settings(data_dir=tmp_path, models={"tiny": str(tiny_model)}, max_pixels=512 * 512)


@pytest.fixture
def store(settings: Settings) -> JobStore:
    made = JobStore(Database(settings.database_url), keep_s=3600, max_queue=settings.max_queue)
    made.create_tables()
    return made


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as made:
        yield made


@pytest.fixture(scope="session")
def loaded_models() -> dict[tuple[str, bool], ModelSet]:
    """Stay loaded between tests, as between a worker's jobs."""
    return {}


@pytest.fixture
def worker(settings: Settings, client: TestClient, loaded_models) -> Iterator[Worker]:
    """Works until the test ends."""
    made = Worker(settings, "test/0", "cpu")
    made._models = loaded_models
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join()


@pytest.fixture
def finish(client: TestClient, worker: Worker) -> Callable[[str], dict[str, Any]]:
    """Waits for a video to be finished and returns it."""

    def wait(video_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            video = client.get(f"/v1/videos/{video_id}").json()
            if video["status"] not in ("queued", "in_progress"):
                return video
            time.sleep(0.05)
        raise AssertionError(f"{video_id} is not finished")

    return wait


@pytest.fixture
def new_job() -> Callable[..., NewJob]:
    def make(**changes: Any) -> NewJob:
        request = {"prompt": PROMPT, "seed": 10, "num_inference_steps": 2}
        return replace(NewJob("", "tiny", "one-stage", request, "48x32", 0.75), **changes)

    return make


@pytest.fixture
def server(settings: Settings, worker: Worker, client: TestClient) -> Iterator[str]:
    """The address of the same server on a real socket."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(client.app, log_level="warning", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL of these tests alone, on a socket in a folder of its own."""
    pytest.importorskip("psycopg", reason="needs psycopg")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))  # where Debian keeps them
    initdb = shutil.which("initdb") or (str(installed[-1]) if installed else None)
    if initdb is None:
        pytest.skip("needs PostgreSQL (initdb)")
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), None
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            user = "postgres"
            try:
                os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        run = {"check": True, "user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        data = str(folder / "data")
        subprocess.run([initdb, "-D", data, "-U", "test", "-A", "trust", "--no-sync"], **run)
        control = [str(Path(initdb).with_name("pg_ctl")), "-D", data, "-w"]
        listen = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        subprocess.run([*control, "-o", listen, "-l", str(folder / "log"), "start"], **run)
        try:
            yield f"postgresql+psycopg://test@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **run)
