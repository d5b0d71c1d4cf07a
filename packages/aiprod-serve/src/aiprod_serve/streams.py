"""Watching a job: server-sent events with previews, and the clip as it grows."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from aiprod_serve.context import ERRORS, Context, Reader, Served
from aiprod_serve.errors import ApiError
from aiprod_serve.files import LIVE, PREVIEW, VIDEO
from aiprod_serve.jobs import Job
from aiprod_serve.schemas import Video

router = APIRouter(prefix="/v1/videos", responses=ERRORS, tags=["Watching"])

POLL_S, POLL_QUEUED_S = 0.3, 1.0
KEEP_ALIVE_S = 15.0
READ_BYTES = 2**18


@router.get(
    "/{video_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def watch_events(served: Served, caller: Reader, video_id: str) -> StreamingResponse:
    """Events until the job ends: `progress`, `preview`, then one that is named as the status.

    Data is the video object, but of `preview`: {"image": a data: URI}. After a broken connection
    just ask again: the first event tells the state as it is.
    """
    job = await to_thread.run_sync(served.job, video_id, caller.owner)
    return StreamingResponse(_events(served, job, caller.owner), media_type="text/event-stream")


@router.get(
    "/{video_id}/stream",
    response_class=StreamingResponse,
    responses={200: {"content": {"video/mp4": {}}}},
)
async def watch_stream(served: Served, caller: Reader, video_id: str) -> StreamingResponse:
    """The clip as a fragmented MP4 that plays while it is made, for jobs with `stream` true."""
    job = await to_thread.run_sync(served.job, video_id, caller.owner)
    if not job.is_streamed:
        raise ApiError(409, "this video is not streamed; create it with stream: true.")
    if job.status in ("failed", "cancelled"):
        raise ApiError(409, f"the video is {job.status}.", code="not_completed")
    return StreamingResponse(_live(served, job, caller.owner), media_type="video/mp4")


async def _events(served: Context, job: Job, owner: str) -> AsyncIterator[str]:
    told: tuple[Any, ...] = ()
    num_previews, quiet_s = 0, 0.0
    while True:
        state = (job.status, job.progress, job.stage)
        if job.num_previews > num_previews:
            num_previews = job.num_previews
            image = await to_thread.run_sync(_read, served.files.work(job) / PREVIEW)
            if image:
                text = base64.b64encode(image).decode()
                yield _event("preview", {"image": f"data:image/jpeg;base64,{text}"})
        if job.is_finished:
            yield _event(job.status, Video.of(job).model_dump())
            return
        if state != told:
            told, quiet_s = state, 0.0
            yield _event("progress", Video.of(job).model_dump())
        elif quiet_s > KEEP_ALIVE_S:
            quiet_s = 0.0
            yield ": still here\n\n"
        wait_s = POLL_QUEUED_S if job.status == "queued" else POLL_S
        await asyncio.sleep(wait_s)
        quiet_s += wait_s
        found = await to_thread.run_sync(served.store.get, job.id, owner)
        if found is None:
            yield _event("deleted", {"id": job.id})
            return
        if found.attempt != job.attempt:
            num_previews = 0
        job = found


async def _live(served: Context, job: Job, owner: str) -> AsyncIterator[bytes]:
    """Waits for the clip to begin, then follows it to its end.

    A stream that has begun is of one attempt: it breaks off when its worker dies.
    """
    attempt = None
    file = None
    try:
        while True:
            if file is None:
                file, attempt = await to_thread.run_sync(_open_live, served, job)
            if file is not None:
                while data := await to_thread.run_sync(file.read, READ_BYTES):
                    yield data
            if job.is_finished or (attempt is not None and job.attempt != attempt):
                return
            await asyncio.sleep(POLL_S)
            found = await to_thread.run_sync(served.store.get, job.id, owner)
            if found is None:
                return
            job = found
    finally:
        if file is not None:
            file.close()


def _open_live(served: Context, job: Job):
    for path in (
        served.files.work(job) / LIVE,
        served.files.work(job) / VIDEO,
        served.files.result(job) / VIDEO,
    ):
        try:
            return path.open("rb"), job.attempt
        except FileNotFoundError:
            continue
    return None, None


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
