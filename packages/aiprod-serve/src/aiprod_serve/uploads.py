"""Files from clients: written under names of ours, looked into by the prober, kept for a while.

A file is named by the hash of its content, and found by its owner alone: their folder is looked in
and no other. Nothing that a client says about a file is believed, neither its name nor its type.
"""

import base64
import binascii
import hashlib
import io
import os
import re
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from anyio import to_thread

from aiprod_core.errors import InputError
from aiprod_serve.errors import ApiError
from aiprod_serve.files import Files
from aiprod_serve.probe import Found, Prober

SCHEME = "aiprod://uploads/"
FILE_ID = re.compile(r"file_[0-9a-f]{32}")
DATA_URI = re.compile(r"data:[\w.+/-]*(;[\w=.+-]+)*;base64,", re.ASCII)
COPY_BYTES = 2**20


@dataclass(frozen=True)
class Upload:
    id: str
    path: Path
    found: Found

    @property
    def storage_uri(self) -> str:
        return SCHEME + self.id

    def describe(self) -> dict[str, object]:
        """What was found in it, without what is absent."""
        facts = asdict(self.found) | {"suffix": None}
        return {name: value for name, value in facts.items() if value is not None}


class Uploads:
    def __init__(self, files: Files, prober: Prober) -> None:
        self.files, self.prober = files, prober

    def new_id(self) -> str:
        return f"file_{secrets.token_hex(16)}"

    def add(self, owner: str, content: IO[bytes] | bytes, *, file_id: str | None = None) -> Upload:
        """Keeps a file, under an id that was announced or that of its content.

        Raises ApiError 400 when it is not media that can be used.
        """
        content = io.BytesIO(content) if isinstance(content, bytes) else content
        digest = hashlib.sha256()
        folder = self.files.uploads(owner)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{secrets.token_hex(16)}"
        try:
            with part.open("xb") as file:
                while data := content.read(COPY_BYTES):
                    file.write(data)
                    digest.update(data)
            found = self._look(part)
            file_id = file_id or f"file_{digest.hexdigest()[:32]}"
            path = folder / f"{file_id}{found.suffix}"
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return Upload(file_id, path, found)

    async def receive(self, owner: str, file_id: str, stream: AsyncIterator[bytes]) -> Upload:
        """Keeps a body as it comes in, under an id that was announced."""
        if not FILE_ID.fullmatch(file_id):
            raise ApiError(404, "no such upload; POST /v1/upload first.", code="no_such_file")
        with tempfile.TemporaryFile() as file:
            async for data in stream:
                await to_thread.run_sync(file.write, data)
            file.seek(0)
            return await to_thread.run_sync(lambda: self.add(owner, file, file_id=file_id))

    def find(self, owner: str, reference: str, param: str) -> Path:
        """The file that a client's reference means: an id, a storage URI or a data: URI."""
        if reference.startswith("data:"):
            return self.add(owner, _decode(reference, param)).path
        file_id = reference.removeprefix(SCHEME)
        if not FILE_ID.fullmatch(file_id):
            raise ApiError(
                400,
                f"{param} is a data: URI with base64, or what an upload to /v1/files returned; "
                "other addresses are not fetched.",
                code="invalid_file",
                param=param,
            )
        path = self.path_of(owner, file_id)
        if path is None:
            raise ApiError(
                400,
                f"{param}: no such upload, or it has expired.",
                code="no_such_file",
                param=param,
            )
        return path

    def path_of(self, owner: str, file_id: str) -> Path | None:
        if not FILE_ID.fullmatch(file_id):
            return None
        return next(self.files.uploads(owner).glob(f"{file_id}.*"), None)

    def remove(self, owner: str, file_id: str) -> bool:
        path = self.path_of(owner, file_id)
        if path is not None:
            path.unlink(missing_ok=True)
        return path is not None

    def _look(self, path: Path) -> Found:
        if path.stat().st_size == 0:
            raise ApiError(400, "the file is empty.", code="invalid_file")
        try:
            return self.prober.probe(path)
        except InputError as error:
            raise ApiError(400, str(error), code="invalid_file") from None


def created_at(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except FileNotFoundError:
        return int(time.time())


def _decode(uri: str, param: str) -> bytes:
    head = DATA_URI.match(uri)
    try:
        if head is None:
            raise ValueError
        return base64.b64decode(uri[head.end() :], validate=True)
    except (ValueError, binascii.Error):
        raise ApiError(
            400, f"{param}: a data: URI needs base64 content.", code="invalid_file", param=param
        ) from None
