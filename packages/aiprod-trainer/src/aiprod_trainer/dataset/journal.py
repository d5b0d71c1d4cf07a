"""What makes preparation safe to kill: whole files, a journal of work, one run to a folder."""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that appears under its name only when it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Makes the folder, keeps other runs out of it, clears what a killed one left half-written.

    Raises InputError while another process is at work there. The kernel drops the lock with the
    process that holds it, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as a folder ({error.strerror}).") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run is writing there; wait for it.") from None
        for leftover in folder.rglob(".*.tmp"):
            if re.fullmatch(r"\..+\.\d+\.tmp", leftover.name):  # as write_whole names them
                leftover.unlink()
        yield
    finally:
        os.close(handle)


def claim(file: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Writes down the settings of a folder's first run, and holds later ones to them.

    `file` is where. Results under other settings must not mix: raises InputError naming what
    differs, unless `overwrite`, where the caller makes everything anew.
    """
    settings = json.loads(json.dumps(settings))
    if file.is_file() and not overwrite:
        before = json.loads(file.read_text())
        differing = [
            f"{key} {_short(before.get(key))} before, now {_short(settings.get(key))}"
            for key in dict.fromkeys([*before, *settings])
            if before.get(key) != settings.get(key)
        ]
        if differing:
            raise InputError(
                f"{file.parent}: was made with other settings ({'; '.join(differing)}). Give "
                "another folder, or --overwrite to start anew."
            )
        return
    write_whole(file, (json.dumps(settings, indent=1) + "\n").encode())


class Journal:
    """Finished pieces of work by their keys, one JSON line each, kept as they come.

    A line that a kill cut short is dropped when the journal is opened again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, Any] = {}
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                key, record = json.loads(line)
                self.records[key] = record
                whole += len(line)
            os.truncate(path, whole)

    def add(self, key: str, record: Any) -> None:
        self.records[key] = record
        with self.path.open("a") as file:
            file.write(json.dumps([key, record]) + "\n")

    def finish(self, keys: Iterable[str]) -> None:
        """Keeps the records of `keys`, in that order, so that how they came leaves no trace."""
        lines = [json.dumps([key, self.records[key]]) + "\n" for key in keys]
        write_whole(self.path, "".join(lines).encode())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
