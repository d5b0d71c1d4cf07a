"""The web process: routes, errors, health and metrics. It computes nothing; workers do.

python -m aiprod_serve.app FD        serves on a listening socket that the supervisor holds
"""

import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from aiprod_core.errors import InputError
from aiprod_pipelines.request import PerModality
from aiprod_serve import ltx, openai, pages, streams
from aiprod_serve.context import ERRORS, Context, Meter, Reader, Served
from aiprod_serve.errors import ApiError, error_response, without_folders
from aiprod_serve.metrics import Metrics
from aiprod_serve.schemas import Generation, Model, ModelList, VideoCreate, VideoRemix
from aiprod_serve.security import Guard
from aiprod_serve.settings import Settings

logger = logging.getLogger(__name__)

WORKER_SILENCE_S = 15.0  # after which a worker counts as gone

router = APIRouter(tags=["Server"])


def create_app(settings: Settings) -> FastAPI:
    """The application. Its working directory is `settings.data_dir`; see files.py."""
    context = Context.open(settings)
    metrics = Metrics(context.store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        context.prober.close()

    app = FastAPI(
        title="AIPROD",
        description="Clips with synchronised sound from a sentence.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.context, app.state.metrics = context, metrics
    for part in (router, openai.router, streams.router, ltx.router, pages.router):
        app.include_router(part)
    app.mount("/studio", pages.studio())
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(ValidationError, _on_invalid)
    app.add_exception_handler(InputError, _on_input_error)
    app.add_exception_handler(OperationalError, _on_no_storage)
    app.add_exception_handler(OSError, _on_no_storage)
    app.add_exception_handler(Exception, _on_error)
    _describe_bodies(app)
    app.add_middleware(
        Guard,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", settings.host, *settings.allowed_hosts}),
        origins=frozenset(settings.cors_origins),
        max_body_bytes=int(settings.max_body_mb * 1e6),
        max_upload_bytes=int(settings.max_upload_mb * 1e6),
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key"],
        )
    app.add_middleware(metrics.middleware)
    return app


@router.get("/health")
def health() -> dict[str, str]:
    """The web process lives."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "No worker is there, or no database."}})
def ready(served: Served, response: Response) -> dict[str, Any]:
    """Whether clips can be made: the database answers and workers are there."""
    workers = served.store.live_workers(WORKER_SILENCE_S)
    if not workers:
        response.status_code = 503
    return {"status": "ready" if workers else "no workers", "workers": len(workers)}


@router.get("/metrics", responses=ERRORS)
def metrics(request: Request, caller: Meter) -> Response:
    text, content_type = request.app.state.metrics.render()
    return Response(text, media_type=content_type)


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
def list_models(served: Served, caller: Reader) -> ModelList:
    """The models with their grids, defaults and pipelines."""
    return ModelList(data=[_model(served, name) for name in served.settings.models])


@router.get("/v1/models/{model}", response_model=Model, responses=ERRORS)
def get_model(served: Served, caller: Reader, model: str) -> Model:
    if model not in served.settings.models:
        raise ApiError(404, "no such model; see /v1/models.", code="model_not_found")
    return _model(served, model)


def _model(served: Context, name: str) -> Model:
    models = served.models.pipeline(name, "one-stage").models
    profile = models.profile
    defaults = {
        key: value._asdict() if isinstance(value, PerModality) else value
        for key, value in vars(profile).items()
        if key not in ("scale", "num_layers", "has_audio")
    }
    return Model(
        id=name,
        created=int(models.checkpoint.paths[0].stat().st_mtime),
        defaults=defaults,
        grid=profile.scale._asdict(),
        has_audio=profile.has_audio,
        pipelines=served.models.pipelines(name),
        camera_motions=list(served.models.camera_motions(name)),
    )


def _describe_bodies(app: FastAPI) -> None:
    """Adds the models of bodies that routes read themselves to the OpenAPI document."""
    make = app.openapi

    def with_bodies() -> dict[str, Any]:
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (VideoCreate, VideoRemix, Generation):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, definition in schema.get("$defs", {}).items():
                schemas.setdefault(name, definition)
        return document

    app.openapi = with_bodies


# Errors.


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(error)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(place)[:200] or None
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param}."
    else:
        message = f"{param}: {first['msg']}." if param else f"{first['msg']}."
    return error_response(ApiError(400, message, code="invalid_request", param=param))


async def _on_input_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(ApiError(400, without_folders(str(error)), code="invalid_request"))


async def _on_no_storage(request: Request, error: Exception) -> JSONResponse:
    """The database is away or the disk is full: it may pass."""
    logger.error("%s %s: %s", request.method, request.url.path, error)
    refusal = ApiError(
        503,
        "the server cannot store anything at present; try again later.",
        code="storage_unavailable",
        headers={"Retry-After": "10"},
    )
    return error_response(refusal)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s", request.method, request.url.path, exc_info=error)
    return error_response(ApiError(500, "the server failed; its log says why.", code="internal"))


def main() -> None:
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(asctime)s web %(message)s")
    settings = Settings.from_environment()
    os.chdir(settings.data_dir)
    listening = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(
        create_app(settings),
        log_level="warning",
        access_log=False,  # paths are no prompts, but there are many
        timeout_graceful_shutdown=5,
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )
    started = time.monotonic()
    uvicorn.Server(config).run(sockets=[listening])
    logger.info("served for %.0f s", time.monotonic() - started)


if __name__ == "__main__":
    main()
