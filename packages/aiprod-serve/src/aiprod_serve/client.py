"""A small client of the server, in both colours. What OpenAI's client cannot: events, uploads.

    with Client("http://127.0.0.1:8000") as client:
        client.generate("a red ball bounces", "ball.mp4", seed=7)

    async with AsyncClient("http://127.0.0.1:8000") as client:
        await client.generate("a red ball bounces", "ball.mp4", seed=7)

Videos are dicts as the server sends them. Errors of the server raise InputError with its sentence.
"""

import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx

from aiprod_core.errors import InputError

Video = dict[str, Any]
FINISHED = ("completed", "failed", "cancelled")

CONNECT_S, READ_S = 10.0, 60.0  # events come at least every 15 s
MAX_TRIES = 5  # at a full queue or a server that is just being restarted
MAX_WAIT_S = 30.0


class Client:
    """One server. `key` is an API key; files are paths on this machine."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.http = httpx.Client(transport=transport, **_options(url, key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def generate(
        self, prompt: str, output: str | Path, *, files: Mapping[str, Path] = {}, **fields: Any
    ) -> Video:
        """Makes a clip and writes it; waits for it."""
        video = self.wait(self.create(prompt, files=files, **fields)["id"])
        self.save(video, output)
        return video

    def create(self, prompt: str, *, files: Mapping[str, Path] = {}, **fields: Any) -> Video:
        """Queues a clip. `fields` and `files` are those of `POST /v1/videos`.

        A full queue is tried again as the server says; the idempotency key keeps it to one clip.
        """
        headers = {"idempotency-key": os.urandom(16).hex()}
        body = {"prompt": prompt, **fields}
        for is_last in (*([False] * (MAX_TRIES - 1)), True):
            with ExitStack() as stack:
                answer = self.http.post(
                    "/v1/videos", headers=headers, **_content(body, files, stack)
                )
            wait_s = _wait_of(answer)
            if wait_s is None or is_last:
                return _checked(answer)
            time.sleep(wait_s)
        raise AssertionError("unreachable")

    def get(self, video_id: str) -> Video:
        return _checked(self.http.get(f"/v1/videos/{video_id}"))

    def list(self, *, limit: int = 20, after: str | None = None) -> list[Video]:
        return _checked(self.http.get("/v1/videos", params=_page(limit, after)))["data"]

    def watch(self, video_id: str) -> Iterator[Video]:
        """The video whenever it has changed, until it is finished. Skips previews."""
        while True:
            try:
                with self.http.stream("GET", f"/v1/videos/{video_id}/events") as answer:
                    if answer.is_error:
                        answer.read()
                        _checked(answer)
                    for video in _videos(answer.iter_lines()):
                        yield video
                        if video.get("status") in FINISHED:
                            return
            except httpx.TransportError:  # the server is being restarted; its jobs go on
                time.sleep(1.0)

    def wait(self, video_id: str) -> Video:
        return list(self.watch(video_id))[-1]

    def cancel(self, video_id: str) -> Video:
        return _checked(self.http.post(f"/v1/videos/{video_id}/cancel"))

    def delete(self, video_id: str) -> None:
        _checked(self.http.delete(f"/v1/videos/{video_id}"))

    def remix(self, video_id: str, prompt: str, **fields: Any) -> Video:
        body = {"prompt": prompt, **fields}
        return _checked(self.http.post(f"/v1/videos/{video_id}/remix", json=body))

    def upload(self, path: str | Path) -> dict[str, Any]:
        """Uploads a file once for many requests, which name it as {"file_id": its id}."""
        with Path(path).open("rb") as file:
            return _checked(self.http.post("/v1/files", files={"file": file}))

    def save(self, video: Video, output: str | Path, *, variant: str = "video") -> Path:
        """Writes a finished clip; the file has its name once it is whole."""
        target = Path(output)
        part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with self.http.stream(
                "GET", _content_url(video), params={"variant": variant}
            ) as answer:
                if answer.is_error:
                    answer.read()
                    _checked(answer)
                with part.open("wb") as file:
                    for data in answer.iter_bytes():
                        file.write(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.http = httpx.AsyncClient(transport=transport, **_options(url, key))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def generate(
        self, prompt: str, output: str | Path, *, files: Mapping[str, Path] = {}, **fields: Any
    ) -> Video:
        created = await self.create(prompt, files=files, **fields)
        video = await self.wait(created["id"])
        await self.save(video, output)
        return video

    async def create(self, prompt: str, *, files: Mapping[str, Path] = {}, **fields: Any) -> Video:
        import asyncio

        headers = {"idempotency-key": os.urandom(16).hex()}
        body = {"prompt": prompt, **fields}
        for is_last in (*([False] * (MAX_TRIES - 1)), True):
            with ExitStack() as stack:
                answer = await self.http.post(
                    "/v1/videos", headers=headers, **_content(body, files, stack)
                )
            wait_s = _wait_of(answer)
            if wait_s is None or is_last:
                return _checked(answer)
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    async def get(self, video_id: str) -> Video:
        return _checked(await self.http.get(f"/v1/videos/{video_id}"))

    async def list(self, *, limit: int = 20, after: str | None = None) -> list[Video]:
        return _checked(await self.http.get("/v1/videos", params=_page(limit, after)))["data"]

    async def watch(self, video_id: str) -> AsyncIterator[Video]:
        import asyncio

        while True:
            try:
                async with self.http.stream("GET", f"/v1/videos/{video_id}/events") as answer:
                    if answer.is_error:
                        await answer.aread()
                        _checked(answer)
                    name = ""
                    async for line in answer.aiter_lines():
                        name, video = _parse_line(name, line)
                        if video is not None:
                            yield video
                            if video.get("status") in FINISHED:
                                return
            except httpx.TransportError:
                await asyncio.sleep(1.0)

    async def wait(self, video_id: str) -> Video:
        return [video async for video in self.watch(video_id)][-1]

    async def cancel(self, video_id: str) -> Video:
        return _checked(await self.http.post(f"/v1/videos/{video_id}/cancel"))

    async def delete(self, video_id: str) -> None:
        _checked(await self.http.delete(f"/v1/videos/{video_id}"))

    async def remix(self, video_id: str, prompt: str, **fields: Any) -> Video:
        body = {"prompt": prompt, **fields}
        return _checked(await self.http.post(f"/v1/videos/{video_id}/remix", json=body))

    async def upload(self, path: str | Path) -> dict[str, Any]:
        data = Path(path).read_bytes()
        return _checked(await self.http.post("/v1/files", files={"file": data}))

    async def save(self, video: Video, output: str | Path, *, variant: str = "video") -> Path:
        answer = await self.http.get(_content_url(video), params={"variant": variant})
        if answer.is_error:
            _checked(answer)
        target = Path(output)
        part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            part.write_bytes(answer.content)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target


# What both share.


def _options(url: str, key: str | None) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
    return {"base_url": url, "headers": headers, "timeout": timeout}


def _content(
    body: Mapping[str, Any], files: Mapping[str, Path], stack: ExitStack
) -> dict[str, Any]:
    """JSON, or a form where files go with it."""
    if not files:
        return {"json": dict(body)}
    opened = {}
    for name, path in files.items():
        try:
            opened[name] = stack.enter_context(open(path, "rb"))  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    texts = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()
    }
    return {"data": texts, "files": opened}


def _page(limit: int, after: str | None) -> dict[str, Any]:
    return {"limit": limit} | ({"after": after} if after else {})


def _content_url(video: Video) -> str:
    if video.get("status") != "completed":
        error = video.get("error") or {}
        raise InputError(
            f"{video.get('id')}: {error.get('message') or 'the video is not completed.'}"
        )
    return f"/v1/videos/{video['id']}/content"


def _wait_of(answer: httpx.Response) -> float | None:
    """Seconds after which the server wants to be asked again; None when it has answered."""
    if answer.status_code not in (429, 503):
        return None
    return min(float(answer.headers.get("retry-after", 1.0)), MAX_WAIT_S)


def _checked(answer: httpx.Response) -> Any:
    if answer.is_success:
        return answer.json()
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{answer.url.host} answered {answer.status_code}"
    raise InputError(message)


def _videos(lines: Iterator[str]) -> Iterator[Video]:
    name = ""
    for line in lines:
        name, video = _parse_line(name, line)
        if video is not None:
            yield video


def _parse_line(name: str, line: str) -> tuple[str, Video | None]:
    """One line of server-sent events: the name that holds, and a video when it is one's data."""
    field, _, value = line.partition(": ")
    if field == "event":
        return value, None
    if field != "data" or name == "preview":
        return name, None
    if name == "deleted":
        raise InputError("the video was deleted.")
    return name, json.loads(value)
