"""What was computed before and comes out the same again: embedded prompts, encoded images.

Entries are named by what decides them (a hash over the contents of the files that compute them, the
input, the precision, the kind of device), so nothing is ever out of date; an entry that a changed
model no longer asks for is simply the first to go. Each is one safetensors file in the user's cache
directory, written under a temporary name and renamed: a crash leaves no half of one, and processes
share the folder without locks. The folder is kept below a size by dropping what was used longest
ago. A prompt's text is in no file, only in the hash that names it.

    AIPROD_CACHE_DIR    where; default: the user's cache directory. "off" keeps nothing.
    AIPROD_CACHE_SIZE   bytes, or with GiB or MiB behind; default 2GiB.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_core.errors import InputError

DEFAULT_SIZE = 2 * 2**30
UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Cache:
    """A folder of at most `max_bytes` of entries."""

    folder: Path
    max_bytes: int = DEFAULT_SIZE

    def get(self, identity: Mapping[str, Any]) -> dict[str, Tensor] | None:
        path = self._path(identity)
        try:
            tensors = load_file(path)
            os.utime(path)  # so that what is used stays longest
            return tensors
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError):  # a damaged disk: make it again
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def put(self, identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keeps an entry if the folder can be written; a full disk stops no clip."""
        path = self._path(identity)
        with contextlib.suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".new-") as folder:
                temporary = Path(folder) / path.name
                save_file(dict(tensors), temporary, metadata={"kind": str(identity["kind"])})
                temporary.replace(path)
            self._shrink()

    def entries(self) -> list[Path]:
        """The entries' files, the one used longest ago first."""
        return [path for _, _, path in self._by_age()]

    def info(self) -> dict[str, Any]:
        """Where it is, how much it holds of each kind, and how much it may."""
        kinds: dict[str, dict[str, int]] = {}
        for _, size, path in self._by_age():
            kind = kinds.setdefault(path.parent.name, {"entries": 0, "bytes": 0})
            kind["entries"] += 1
            kind["bytes"] += size
        total = sum(kind["bytes"] for kind in kinds.values())
        return {
            "folder": str(self.folder),
            "bytes": total,
            "max_bytes": self.max_bytes,
            "kinds": kinds,
        }

    def clear(self) -> int:
        """Removes every entry and returns how many there were."""
        paths = self.entries()
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _path(self, identity: Mapping[str, Any]) -> Path:
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / identity["kind"] / f"{name}.safetensors"

    def _by_age(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process dropped it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _shrink(self) -> None:
        entries = self._by_age()
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def open_cache() -> Cache | None:
    """The user's cache as the environment has it, or None where it is off."""
    place = os.environ.get("AIPROD_CACHE_DIR")
    if place == "off":
        return None
    folder = Path(place) if place else platformdirs.user_cache_path("aiprod")
    return Cache(folder, parse_size(os.environ.get("AIPROD_CACHE_SIZE", "2GiB")))


def parse_size(text: str) -> int:
    """Bytes of "12GiB", "500 MiB" or "1073741824". Raises InputError for anything else."""
    match = re.fullmatch(r"([\d.]+)\s*(|KiB|MiB|GiB)", text.strip(), re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        return int(float(match.group(1)) * UNITS[match.group(2).upper()])
    except ValueError:
        raise InputError(f'a size is a number with MiB or GiB; got "{text}", try 12GiB.') from None
