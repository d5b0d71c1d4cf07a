"""LTX's public API: /v1 answers with the clip itself, /v2 with a job to ask after.

Addresses of other servers are not fetched: files come as data: URIs or are uploaded before.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_serve.context import ERRORS, Context, Generator, Reader, Served
from aiprod_serve.errors import ApiError
from aiprod_serve.jobs import Job
from aiprod_serve.openai import content_response
from aiprod_serve.schemas import (
    ErrorBody,
    LtxAudio,
    LtxExtend,
    LtxImage,
    LtxJob,
    LtxRetake,
    LtxText,
    LtxUpload,
)

router = APIRouter(responses=ERRORS, tags=["LTX"])

POLL_S = 0.2
STATUS = {"queued": "pending", "in_progress": "processing", "cancelled": "failed"}
MODES = {"replace_audio_and_video": "both", "replace_video": "video", "replace_audio": "audio"}
# What stands for a prompt that LTX lets a client leave out.
NO_PROMPT = "the scene goes on"

_MP4: dict[int | str, dict[str, Any]] = {
    200: {"content": {"video/mp4": {}}, "description": "The clip."},
    500: {"description": "The clip could not be made."},
    504: {"description": "It took too long; use /v2."},
}


def of_text(served: Context, owner: str, body: LtxText) -> Job:
    return _queue(served, owner, body, served.settings.pipeline, {})


def of_image(served: Context, owner: str, body: LtxImage) -> Job:
    image = served.uploads.find(owner, body.image_uri, "image_uri")
    values = {"images": [{"path": str(image)}]}
    return _queue(served, owner, body, served.settings.pipeline, values)


def of_audio(served: Context, owner: str, body: LtxAudio) -> Job:
    sound = served.uploads.find(owner, body.audio_uri, "audio_uri")
    values: dict[str, Any] = {"audio": str(sound)}
    if body.image_uri is not None:
        image = served.uploads.find(owner, body.image_uri, "image_uri")
        values["images"] = [{"path": str(image)}]
    model = _model(served, body.model)
    if body.duration is None:  # as long as the sound
        duration_s = media.probe(sound).duration_s
        values["num_frames"] = served.submissions.nearest_frames(model, duration_s, body.fps)
    # Without an upsampler the picture is made at full size at once.
    values["skip_stage_2"] = not served.models.has_upsampler(model)
    return _queue(served, owner, body, "audio-to-video", values)


def of_retake(served: Context, owner: str, body: LtxRetake) -> Job:
    source = served.uploads.find(owner, body.video_uri, "video_uri")
    length_s = media.probe(source).duration_s
    values = {
        "prompt": body.prompt or NO_PROMPT,
        "source": str(source),
        "start_time": body.start_time,
        # A span beyond the end is cut, as LTX does.
        "end_time": min(body.start_time + body.duration, length_s),
        "modality": MODES[body.mode],
    }
    return _queue_edit(served, owner, body, "retake", values)


def of_extend(served: Context, owner: str, body: LtxExtend) -> Job:
    source = served.uploads.find(owner, body.video_uri, "video_uri")
    info = media.probe(source)
    model = _model(served, body.model)
    wanted = info.duration_s + body.duration
    values = {
        "prompt": body.prompt or NO_PROMPT,
        "source": str(source),
        "num_frames": served.submissions.nearest_frames(model, wanted, info.fps),
    }
    return _queue_edit(served, owner, body, "extend", values)


@router.post("/v1/text-to-video", response_class=FileResponse, responses=_MP4)
async def text_to_video(request: Request, served: Served, caller: Generator, body: LtxText):
    job = await to_thread.run_sync(of_text, served, caller.owner, body)
    return await _wait(request, served, job)


@router.post("/v1/image-to-video", response_class=FileResponse, responses=_MP4)
async def image_to_video(request: Request, served: Served, caller: Generator, body: LtxImage):
    job = await to_thread.run_sync(of_image, served, caller.owner, body)
    return await _wait(request, served, job)


@router.post("/v1/audio-to-video", response_class=FileResponse, responses=_MP4)
async def audio_to_video(request: Request, served: Served, caller: Generator, body: LtxAudio):
    job = await to_thread.run_sync(of_audio, served, caller.owner, body)
    return await _wait(request, served, job)


@router.post("/v1/retake", response_class=FileResponse, responses=_MP4)
async def retake(request: Request, served: Served, caller: Generator, body: LtxRetake):
    job = await to_thread.run_sync(of_retake, served, caller.owner, body)
    return await _wait(request, served, job)


@router.post("/v2/text-to-video", status_code=202, response_model=LtxJob)
def submit_text(request: Request, served: Served, caller: Generator, body: LtxText):
    return _job(request, of_text(served, caller.owner, body), "text-to-video")


@router.post("/v2/image-to-video", status_code=202, response_model=LtxJob)
def submit_image(request: Request, served: Served, caller: Generator, body: LtxImage):
    return _job(request, of_image(served, caller.owner, body), "image-to-video")


@router.post("/v2/audio-to-video", status_code=202, response_model=LtxJob)
def submit_audio(request: Request, served: Served, caller: Generator, body: LtxAudio):
    return _job(request, of_audio(served, caller.owner, body), "audio-to-video")


@router.post("/v2/retake", status_code=202, response_model=LtxJob)
def submit_retake(request: Request, served: Served, caller: Generator, body: LtxRetake):
    return _job(request, of_retake(served, caller.owner, body), "retake")


@router.post("/v2/extend", status_code=202, response_model=LtxJob)
def submit_extend(request: Request, served: Served, caller: Generator, body: LtxExtend):
    return _job(request, of_extend(served, caller.owner, body), "extend")


ENDPOINTS = ("text-to-video", "image-to-video", "audio-to-video", "retake", "extend")


@router.get("/v2/{endpoint}/{job_id}", response_model=LtxJob)
def get_job(request: Request, served: Served, caller: Reader, endpoint: str, job_id: str):
    if endpoint not in ENDPOINTS:
        raise ApiError(404, f"no such endpoint; there is {', '.join(ENDPOINTS)}.")
    return _job(request, served.job(job_id, caller.owner), endpoint)


# Uploads in two steps: an address, then the file.


@router.post("/v1/upload", response_model=LtxUpload)
def announce_upload(request: Request, served: Served, caller: Generator) -> LtxUpload:
    """Names the address to PUT a file to, with the same key, and what to call it afterwards."""
    file_id = served.uploads.new_id()
    expires = datetime.now(UTC) + timedelta(hours=1)
    return LtxUpload(
        upload_url=str(request.url_for("receive_upload", file_id=file_id)),
        storage_uri=f"aiprod://uploads/{file_id}",
        expires_at=expires.isoformat(),
        required_headers={"Content-Type": "application/octet-stream"},
    )


@router.put(
    "/v1/upload/{file_id}",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def receive_upload(
    request: Request, served: Served, caller: Generator, file_id: str
) -> dict[str, Any]:
    upload = await served.uploads.receive(caller.owner, file_id, request.stream())
    return {"storage_uri": upload.storage_uri, "media": upload.describe()}


# Parts.


def _model(served: Context, name: str | None) -> str:
    return name or next(iter(served.settings.models))


def _queue(
    served: Context, owner: str, body: LtxText, pipeline: str, values: dict[str, Any]
) -> Job:
    model = _model(served, body.model)
    values = {"prompt": body.prompt, **values}
    for name in ("generate_audio", "seed", "negative_prompt", "num_inference_steps"):
        if getattr(body, name) is not None:
            values[name] = getattr(body, name)
    if body.fps is not None:
        values["frame_rate"] = body.fps
    if body.duration is not None:
        if body.duration > served.settings.max_clip_s:
            raise InputError(f"duration is at most {served.settings.max_clip_s:g} s.")
        values["num_frames"] = served.submissions.nearest_frames(model, body.duration, body.fps)
    if body.camera_motion is not None:
        lora = served.models.camera_lora(model, body.camera_motion)
        values["loras"] = [{"path": str(lora.path), "strength": lora.strength}]
    if body.resolution is not None:
        size = served.submissions.nearest_size(model, pipeline, body.resolution, values)
        values["height"], values["width"] = size
    return served.submissions.queue(owner, model, pipeline, values)


def _queue_edit(
    served: Context,
    owner: str,
    body: LtxRetake | LtxExtend,
    pipeline: str,
    values: dict[str, Any],
) -> Job:
    model = _model(served, body.model)
    if body.seed is not None:
        values["seed"] = body.seed
    resolution = getattr(body, "resolution", None)
    if resolution is not None:
        size = served.submissions.nearest_size(model, pipeline, resolution, values)
        values["height"], values["width"] = size
    return served.submissions.queue(owner, model, pipeline, values)


async def _wait(request: Request, served: Context, job: Job) -> FileResponse:
    """Holds the connection until the clip is there. A client that leaves cancels its job."""
    waited_s = 0.0
    while not job.is_finished:
        if waited_s > served.settings.sync_timeout_s or await request.is_disconnected():
            await to_thread.run_sync(served.store.cancel, job.id)
            raise ApiError(
                504, "the clip was not made in time; use /v2, which does not wait.", code="timeout"
            )
        await asyncio.sleep(POLL_S)
        waited_s += POLL_S
        job = await to_thread.run_sync(served.job, job.id, job.owner)
    if job.status == "completed":
        return content_response(served, job)
    status = 400 if job.error_code == "invalid_request" else 500
    if job.status == "cancelled":
        status = 409
    message = job.error_message or "the job was cancelled."
    raise ApiError(status, message, code=job.error_code, headers={"x-request-id": job.id})


def _job(request: Request, job: Job, endpoint: str) -> LtxJob:
    result = error = None
    if job.status == "completed":
        url = request.url_for("get_content", video_id=job.id)
        result = {"video_url": str(url)}
    elif job.status in ("failed", "cancelled"):
        error = ErrorBody(
            message=job.error_message or "the job was cancelled.",
            type="generation_error",
            param=None,
            code=job.error_code or "cancelled",
        )
    return LtxJob(
        id=job.id,
        created_at=_iso(job.created_at),
        completed_at=_iso(job.finished_at) if job.finished_at else None,
        status=STATUS.get(job.status, job.status),  # pyright: ignore[reportArgumentType]
        result=result,
        error=error,
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
