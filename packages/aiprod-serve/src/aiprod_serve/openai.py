"""OpenAI's videos API, which its Python client speaks: create, list, poll, download, remix.

Beyond it: cancel, events, live streams, uploads (as OpenAI's files) and AIPROD's own fields.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from aiprod_serve.context import ERRORS, Context, Generator, Reader, Served
from aiprod_serve.errors import ApiError
from aiprod_serve.files import SPRITESHEET, THUMBNAIL, VIDEO
from aiprod_serve.jobs import Job
from aiprod_serve.schemas import (
    FileObject,
    FileReference,
    Video,
    VideoCreate,
    VideoDeleted,
    VideoList,
    VideoRemix,
)
from aiprod_serve.uploads import Upload, created_at

router = APIRouter(prefix="/v1", responses=ERRORS, tags=["OpenAI videos"])

Body = TypeVar("Body", bound=BaseModel)

VARIANTS = {
    "video": (VIDEO, "video/mp4"),
    "thumbnail": (THUMBNAIL, "image/webp"),
    "spritesheet": (SPRITESHEET, "image/jpeg"),
}
# Files that may come with the fields of a form, and the fields that hold JSON in one.
ATTACHED = ("input_reference", "audio", "source")
MAX_FORM_FIELDS = 64
MAX_FIELD_BYTES = 2**20

# A queued job is asked after more seldom the longer it has to wait.
POLL_MS, POLL_MS_A_PLACE, MAX_POLL_MS = 500, 50, 10_000


def body_of(model: type[BaseModel], *, has_form: bool = True) -> dict[str, Any]:
    """What the OpenAPI document says of a body that the route reads itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if has_form:
        fields = {
            name: {"type": "string", "format": "binary"} if name in ATTACHED else value
            for name, value in schema["properties"].items()
        }
        content["multipart/form-data"] = {"schema": {**schema, "properties": fields}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/videos", response_model=Video, openapi_extra=body_of(VideoCreate))
async def create_video(
    request: Request,
    served: Served,
    caller: Generator,
    response: Response,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")
    ] = None,
) -> Video:
    """Queues a clip, from JSON or from a form that carries its files."""
    body, attached = await read_body(request, VideoCreate, served, caller.owner)
    body = body.model_copy(update=attached)

    def queue() -> Video:
        job = served.submissions.create(caller.owner, body, idempotency_key=idempotency_key)
        return _answer(served, job, response)

    return await to_thread.run_sync(queue)


@router.get("/videos", response_model=VideoList)
def list_videos(
    served: Served,
    caller: Reader,
    after: Annotated[str | None, Query(max_length=100, pattern=r"^[\w-]+$")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    page = served.store.page(
        caller.owner, limit=limit + 1, after=after, is_newest_first=order == "desc"
    )
    if page is None:
        raise ApiError(400, "after is no video of yours.", code="video_not_found", param="after")
    data = [Video.of(job) for job in page[:limit]]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(page) > limit,
    )


@router.get("/videos/{video_id}", response_model=Video)
def get_video(served: Served, caller: Reader, video_id: str, response: Response) -> Video:
    return _answer(served, served.job(video_id, caller.owner), response)


@router.delete("/videos/{video_id}", response_model=VideoDeleted)
def delete_video(served: Served, caller: Generator, video_id: str) -> VideoDeleted:
    """Removes a clip and all that belongs to it; one that is being made is stopped."""
    served.job(video_id, caller.owner)
    served.store.delete(video_id, caller.owner)
    served.files.remove(video_id)
    return VideoDeleted(id=video_id)


@router.post("/videos/{video_id}/cancel", response_model=Video)
def cancel_video(served: Served, caller: Generator, video_id: str) -> Video:
    """Stops a clip: at once if it waits, after the step that it is in if it is being made."""
    served.job(video_id, caller.owner)
    job = served.store.cancel(video_id, caller.owner)
    if job is None:
        raise ApiError(404, "no such video.", code="video_not_found")
    if job.status in ("completed", "failed"):
        raise ApiError(409, f"the video is {job.status} already.", code="already_finished")
    return Video.of(job)


@router.post(
    "/videos/{video_id}/remix",
    response_model=Video,
    openapi_extra=body_of(VideoRemix, has_form=False),
)
async def remix_video(request: Request, served: Served, caller: Generator, video_id: str) -> Video:
    """Makes a clip anew with another prompt, or any other field changed."""
    body, _ = await read_body(request, VideoRemix, served, caller.owner)
    source = await to_thread.run_sync(served.job, video_id, caller.owner)
    job = await to_thread.run_sync(
        served.submissions.remix, caller.owner, source, body.prompt, body
    )
    return Video.of(job)


@router.get(
    "/videos/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {kind: {} for _, kind in VARIANTS.values()}},
        206: {"description": "The range that was asked for."},
        416: {"description": "No such range."},
    },
)
def get_content(
    served: Served,
    caller: Reader,
    video_id: str,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> FileResponse:
    """The clip itself, or stills of it. Serves ranges."""
    return content_response(served, served.job(video_id, caller.owner), variant)


def content_response(served: Context, job: Job, variant: str = "video") -> FileResponse:
    if job.status != "completed":
        raise ApiError(409, f"the video is {job.status}.", code="not_completed")
    name, media_type = VARIANTS[variant]
    path = served.files.result(job) / name
    if not path.is_file():
        raise ApiError(404, f"this video has no {variant}.", code="no_such_variant")
    headers = {"x-request-id": job.id, "cache-control": "private, max-age=3600"}
    return FileResponse(path, media_type=media_type, filename=f"{job.id}{path.suffix}",
                        headers=headers, content_disposition_type="inline")  # fmt: skip


# Uploads, as OpenAI's files.

_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string"},
    },
}


@router.post(
    "/files",
    response_model=FileObject,
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    },
)
async def upload_file(request: Request, served: Served, caller: Generator) -> FileObject:
    """Takes an image, a sound or a clip that requests can name. Kept for a day."""
    async with request.form(max_files=1, max_fields=2, max_part_size=MAX_FIELD_BYTES) as form:
        unknown = sorted(set(form) - {"file", "purpose"})
        if unknown:
            raise ApiError(400, f"unknown field {unknown[0]}.", param=unknown[0])
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "the form has no file.", param="file")
        upload = await to_thread.run_sync(served.uploads.add, caller.owner, file.file)
    return _file_object(served, upload, str(form.get("purpose") or "user_data")[:100])


@router.delete("/files/{file_id}")
def delete_file(served: Served, caller: Generator, file_id: str) -> dict[str, Any]:
    """Forgets an upload; clips that were made from it keep their copy."""
    if not served.uploads.remove(caller.owner, file_id):
        raise ApiError(404, "no such file, or it has expired.", code="file_not_found")
    return {"id": file_id, "object": "file", "deleted": True}


def _file_object(served: Context, upload: Upload, purpose: str) -> FileObject:
    created = created_at(upload.path)
    return FileObject(
        id=upload.id,
        bytes=upload.path.stat().st_size,
        created_at=created,
        expires_at=created + int(served.settings.keep_uploads_hours * 3600),
        filename=upload.path.name,
        purpose=purpose,
        storage_uri=upload.storage_uri,
        media=upload.describe(),
    )


# Reading bodies.


async def read_body(
    request: Request, model: type[Body], served: Context, owner: str
) -> tuple[Body, dict[str, FileReference]]:
    """A body of JSON, or of a form with its files taken in. Raises ApiError and ValidationError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return model.model_validate_json(await request.body()), {}
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(
            400, "send application/json or multipart/form-data.", code="bad_content_type"
        )
    async with request.form(
        max_files=len(ATTACHED), max_fields=MAX_FORM_FIELDS, max_part_size=MAX_FIELD_BYTES
    ) as form:
        fields: dict[str, Any] = {}
        files: dict[str, UploadFile] = {}
        for name, value in form.multi_items():
            if name in fields or name in files:
                raise ApiError(400, f"{name} is given twice.", param=name)
            if isinstance(value, UploadFile):
                files[name] = value
            else:
                fields[name] = _from_form(value)
        unknown = sorted(set(files) - set(ATTACHED))
        if unknown:
            raise ApiError(
                400, f"a file cannot be {unknown[0]}; fields for files are {', '.join(ATTACHED)}.",
                param=unknown[0],
            )  # fmt: skip
        body = model.model_validate(fields)  # before the files are looked into
        await to_thread.run_sync(served.submissions.check_room)
        attached = {}
        for name, file in files.items():
            upload = await to_thread.run_sync(served.uploads.add, owner, file.file)
            attached[name] = FileReference(file_id=upload.id)
    return body, attached


def _from_form(text: str) -> Any:
    """Lists and objects come as JSON in a form."""
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _answer(served: Context, job: Job, response: Response) -> Video:
    """A job, and when it is worth asking again: OpenAI's client obeys this header."""
    if not job.is_finished:
        wait_ms = POLL_MS
        if job.status == "queued":
            wait_ms += POLL_MS_A_PLACE * served.store.place_in_queue(job)
        response.headers["openai-poll-after-ms"] = str(min(wait_ms, MAX_POLL_MS))
    return Video.of(job)
