"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

# The folders of an absolute path, not those of a URL.
FOLDERS = re.compile(r"(?<![\w/.:])/(?:[^\s/:;,'\"]+/)+")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """A request that is refused; `message` is one sentence that names the remedy."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.code, self.param = code, param


def without_folders(message: str) -> str:
    """A sentence that names files of this machine by their names alone: clients may read it."""
    return FOLDERS.sub("", message)


def error_response(error: HTTPException) -> JSONResponse:
    status = error.status_code
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {
        "message": _sendable(str(error.detail)),
        "type": kind,
        "param": _sendable(getattr(error, "param", None)),
        "code": getattr(error, "code", None),
    }
    return JSONResponse({"error": body}, status, headers=error.headers)


def _sendable(text: str | None) -> str | None:
    """JSON may name fields that UTF-8 cannot write: lone surrogates."""
    return None if text is None else text.encode("utf-8", "replace").decode()
