"""What every route works with, and who may call it."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from aiprod_serve.database import Database
from aiprod_serve.errors import ApiError
from aiprod_serve.files import Files
from aiprod_serve.jobs import Job, JobStore
from aiprod_serve.probe import Limits, Prober
from aiprod_serve.schemas import ErrorEnvelope
from aiprod_serve.security import Caller, Gatekeeper
from aiprod_serve.settings import Settings
from aiprod_serve.submission import ServedModels, Submissions
from aiprod_serve.uploads import Uploads


@dataclass(frozen=True)
class Context:
    """One web process: its settings and all that is opened by them."""

    settings: Settings
    store: JobStore
    files: Files
    models: ServedModels
    uploads: Uploads
    submissions: Submissions
    gatekeeper: Gatekeeper
    prober: Prober

    @classmethod
    def open(cls, settings: Settings) -> "Context":
        database = Database(settings.database_url)
        store = JobStore(database, keep_s=settings.keep_days * 86400, max_queue=settings.max_queue)
        store.create_tables()
        files = Files(settings.data_dir)
        files.create_folders()
        limits = Limits(
            max_pixels=settings.max_pixels,
            max_duration_s=settings.max_clip_s,
            timeout_s=settings.probe_timeout_s,
            memory_mb=settings.probe_memory_mb,
        )
        prober = Prober(limits)
        models = ServedModels(settings)
        uploads = Uploads(files, prober)
        submissions = Submissions(settings, store, files, models, uploads)
        return cls(
            settings, store, files, models, uploads, submissions, Gatekeeper(database), prober
        )

    def job(self, job_id: str, owner: str) -> Job:
        """Raises ApiError 404 for a job that is not there, or another's."""
        is_possible = job_id.isascii() and job_id.isprintable()
        job = self.store.get(job_id, owner) if is_possible else None
        if job is None:
            raise ApiError(404, "no such video, or it has expired.", code="video_not_found")
        return job


# Asynchronous, for a thread each would cost more than they do: keys are read every few seconds.


async def _context(request: Request) -> Context:
    return request.app.state.context


async def _may_generate(request: Request) -> Caller:
    return _admit(request, "generate")


async def _may_read(request: Request) -> Caller:
    return _admit(request, "read")


async def _may_measure(request: Request) -> Caller:
    return _admit(request, "metrics")


def _admit(request: Request, scope: str) -> Caller:
    context: Context = request.app.state.context
    return context.gatekeeper.admit(request.headers.get("authorization"), scope)


Served = Annotated[Context, Depends(_context)]
Generator = Annotated[Caller, Depends(_may_generate)]
Reader = Annotated[Caller, Depends(_may_read)]
Meter = Annotated[Caller, Depends(_may_measure)]

_REASONS = {
    400: "The request cannot be used; the message says why.",
    401: "No valid API key.",
    403: "The key lacks the scope, or a page of another origin calls.",
    404: "Not found, or expired.",
    409: "Not in this state.",
    413: "Too long.",
    429: "The queue is full, or the key's rate is used up; see Retry-After.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": text} for status, text in _REASONS.items()
}
