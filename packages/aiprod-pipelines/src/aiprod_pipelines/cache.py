"""What was computed before and comes out the same again, kept between runs.

Embedded prompts, encoded images, weights with adapters in them, and compiled code.

Entries are named by what decides them (a hash over the contents of the files that compute them, the
input, the precision, the kind of device), so nothing is ever out of date; an entry that a changed
model no longer asks for is simply the first to go. Each is one safetensors file in the user's cache
directory, written under a temporary name and renamed: a crash leaves no half of one, and processes
share the folder without locks. The folder is kept below a size by dropping what was used longest
ago. A prompt's text is in no file, only in the hash that names it.

Weights and code are large and soon made again, so they get no more than half of the folder: the
other half stays for prompts and images. Code is a folder an entry, which PyTorch's compiler fills.

    AIPROD_CACHE_DIR    where; default: the user's cache directory. "off" keeps nothing.
    AIPROD_CACHE_SIZE   bytes, or with GiB or MiB behind; default 2GiB.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_core.errors import InputError

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 2 * 2**30
LARGE_KINDS = ("merged", "compiled")
ABANDONED_S = 3600  # a temporary folder so old is of a process that was killed
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
        """Keeps an entry if there is room and the folder can be written; a full disk stops no clip.

        There is no room for one that would be the first to go again.
        """
        path = self._path(identity)
        if sum(tensor.nbytes for tensor in tensors.values()) > self.room(identity["kind"]):
            return
        with contextlib.suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".new-") as folder:
                temporary = Path(folder) / path.name
                save_file(dict(tensors), temporary, metadata={"kind": str(identity["kind"])})
                temporary.replace(path)
            self._shrink()

    def room(self, kind: str) -> int:
        """Bytes that entries of this kind can take at most."""
        return self.max_bytes // 2 if kind in LARGE_KINDS else self.max_bytes

    def code_folder(self, identity: Mapping[str, Any]) -> Path | None:
        """Where a compiler keeps what it makes of `identity`; None where it cannot be written.

        Others' entries make room now, and this one when the next is asked for.
        """
        path = self._path(identity).with_suffix("").absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            os.utime(path)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError:
            return None
        self._shrink()
        path.mkdir(exist_ok=True)  # it may have been too large itself
        return path

    def entries(self) -> list[Path]:
        """The entries' files and folders, the one used longest ago first."""
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
            _remove(path)
        return len(paths)

    def _path(self, identity: Mapping[str, Any]) -> Path:
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / identity["kind"] / f"{name}.safetensors"

    def _by_age(self) -> list[tuple[float, int, Path]]:
        found = []
        # Not ".new-*": what others are writing.
        files = self.folder.glob("[!.]*/*.safetensors")
        for path in [*files, *self.folder.glob("compiled/*/")]:
            with contextlib.suppress(FileNotFoundError):  # another process dropped it
                parts = path.rglob("*") if path.is_dir() else [path]
                size = sum(part.stat().st_size for part in parts if part.is_file())
                found.append((path.stat().st_mtime, size, path))
        return sorted(found)

    def _shrink(self) -> None:
        self._drop_oldest(self.max_bytes // 2, LARGE_KINDS)
        self._drop_oldest(self.max_bytes)
        for folder in self.folder.glob(".new-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > ABANDONED_S:
                    _remove(folder)

    def _drop_oldest(self, limit: int, kinds: Collection[str] | None = None) -> None:
        """Until the entries, or those of some kinds, take no more than `limit` bytes."""
        entries = [e for e in self._by_age() if kinds is None or e[2].parent.name in kinds]
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= limit:
                return
            _remove(path)
            total -= size


def open_cache() -> Cache | None:
    """The user's cache as the environment has it, or None where it is off."""
    place = os.environ.get("AIPROD_CACHE_DIR")
    if place == "off":
        return None
    folder = Path(place) if place else platformdirs.user_cache_path("aiprod")
    return Cache(folder, parse_size(os.environ.get("AIPROD_CACHE_SIZE", "2GiB")))


def keep_compiled_code(config: Any) -> Path | None:
    """Has torch.compile find, from now on in this process, what an earlier process compiled.

    `config` is that of the network. Returns the folder in which PyTorch keeps code, kernels and
    graphs, under its own hashes of what they were made from; None where the cache is off, cannot be
    written, or TORCHINDUCTOR_CACHE_DIR names a folder already. PyTorch's portable artefacts
    (`torch.compiler.save_cache_artifacts`) would be one file, but lack a CPU's machine code, which
    is most of the work.
    """
    cache = open_cache()
    if cache is None or not _is_ours_to_choose(os.environ.get("TORCHINDUCTOR_CACHE_DIR"), cache):
        return None
    is_cuda = torch.cuda.is_available()
    identity = {
        "kind": "compiled",
        "config": repr(config),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
    }
    folder = cache.code_folder(identity)
    if folder is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        found = "found" if any(folder.iterdir()) else "will be kept"
        logger.info("compiled code %s in %s", found, folder)
    return folder


def _is_ours_to_choose(chosen: str | None, cache: Cache) -> bool:
    """Whether the folder for compiled code is not the user's choice.

    PyTorch writes its own default into the environment as soon as its compiler is imported.
    """
    if not chosen:
        return True
    folder = Path(chosen)
    default = Path(tempfile.gettempdir()) / "torchinductor_"
    is_default = folder.parent == default.parent and folder.name.startswith(default.name)
    return is_default or folder.is_relative_to(cache.folder.absolute())


def _processor() -> str:
    """What tells processors apart that run different machine code."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags", "Features", "CPU part")
        return "; ".join(sorted({line for line in lines if line.startswith(names)}))
    return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def parse_size(text: str) -> int:
    """Bytes of "12GiB", "500 MiB" or "1073741824". Raises InputError for anything else."""
    match = re.fullmatch(r"([\d.]+)\s*(|KiB|MiB|GiB)", text.strip(), re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        return int(float(match.group(1)) * UNITS[match.group(2).upper()])
    except ValueError:
        raise InputError(f'a size is a number with MiB or GiB; got "{text}", try 12GiB.') from None
