"""Who may do what: API keys, scopes, rate limits; what a browser may be made to do.

A key is `aiprod_ID_SECRET`. The database holds the id and the SHA-256 of the secret: 256 random
bits, which no one finds from the hash, so that a slow password hash would only cost time. While
there are no keys, everyone who reaches the server may use it; it then refuses to listen on any but
a loopback address.
"""

import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import sqlalchemy as sa
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiprod_core.errors import InputError
from aiprod_serve.database import Database, metadata
from aiprod_serve.errors import ApiError, error_response

SCOPES = ("generate", "read", "metrics")
DEFAULT_SCOPES = ("generate", "read")
DEFAULT_RATE = 600  # requests a minute

# How long a web process may go on with what it read of the keys.
KEYS_FRESH_S = 2.0

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(20), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(100), nullable=False),  # separated by spaces
    sa.Column("rate", sa.Integer, nullable=False),  # requests a minute
    sa.Column("created_at", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class Key:
    id: str
    name: str
    secret_sha256: str
    scopes: frozenset[str]
    rate: int
    created_at: float


@dataclass(frozen=True)
class Caller:
    """Who sends a request. `owner` is what their jobs are filed under."""

    owner: str
    scopes: frozenset[str]


ANYONE = Caller("", frozenset(SCOPES))


def create_key(
    database: Database,
    name: str,
    scopes: tuple[str, ...] = DEFAULT_SCOPES,
    rate: int = DEFAULT_RATE,
) -> tuple[Key, str]:
    """A new key and its text, which is shown this once. Raises InputError for unknown scopes."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise InputError(f"scopes are of {', '.join(SCOPES)}; got {', '.join(unknown) or 'none'}.")
    if rate < 1:
        raise InputError(f"the rate is at least 1 request a minute; got {rate}.")
    secret = secrets.token_urlsafe(32)
    key = Key(secrets.token_hex(8), name, _sha256(secret), frozenset(scopes), rate, time.time())
    with database.writing() as connection:
        connection.execute(
            keys.insert().values(**{**key.__dict__, "scopes": " ".join(sorted(scopes))})
        )
    return key, f"aiprod_{key.id}_{secret}"


def list_keys(database: Database) -> list[Key]:
    with database.reading() as connection:
        rows = connection.execute(sa.select(keys).order_by(keys.c.created_at)).all()
    return [Key(**{**row._mapping, "scopes": frozenset(row.scopes.split())}) for row in rows]


def revoke_key(database: Database, key_id: str) -> None:
    with database.writing() as connection:
        if not connection.execute(keys.delete().where(keys.c.id == key_id)).rowcount:
            raise InputError(f"{key_id}: no such key; `aiprod serve keys list` shows them.")


class Gatekeeper:
    """Tells who calls and whether they may. Keeps the keys for moments, their rates for good."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lock = threading.Lock()
        self._keys: dict[str, Key] = {}
        self._read_at = 0.0
        self._allowances: dict[str, tuple[float, float]] = {}  # tokens left, at what time

    def admit(self, authorization: str | None, scope: str) -> Caller:
        """Raises ApiError: 401 without a valid key, 403 beyond its scopes, 429 above its rate."""
        with self._lock:
            self._refresh()
            known = self._keys
            if not known:
                return ANYONE
            key = _match(known, authorization)
            if key is None:
                raise ApiError(
                    401,
                    "no valid API key; send one as `Authorization: Bearer aiprod_...`.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            wait_s = self._take_token(key)
        if wait_s > 0:
            raise ApiError(
                429,
                f"this key may send {key.rate} requests a minute.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(wait_s) + 1)},
            )
        if scope not in key.scopes:
            raise ApiError(
                403, f"this key has not the scope {scope}.", code="insufficient_permissions"
            )
        return Caller(key.id, key.scopes)

    def _refresh(self) -> None:
        if time.monotonic() - self._read_at > KEYS_FRESH_S or not self._read_at:
            self._keys = {key.id: key for key in list_keys(self.database)}
            self._read_at = time.monotonic()

    def _take_token(self, key: Key) -> float:
        """A token bucket of one minute's requests; returns the seconds to wait, or 0."""
        now = time.monotonic()
        tokens, since = self._allowances.get(key.id, (float(key.rate), now))
        tokens = min(float(key.rate), tokens + (now - since) * key.rate / 60)
        if tokens < 1:
            return (1 - tokens) * 60 / key.rate
        self._allowances[key.id] = (tokens - 1, now)
        return 0.0


def _match(known: dict[str, Key], authorization: str | None) -> Key | None:
    scheme, _, text = (authorization or "").partition(" ")
    prefix, _, rest = text.strip().partition("_")
    key_id, _, secret = rest.partition("_")
    key = known.get(key_id)
    if scheme.lower() != "bearer" or prefix != "aiprod" or key is None:
        return None
    return key if hmac.compare_digest(key.secret_sha256, _sha256(secret)) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


# What surrounds every request, as ASGI middleware.

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class Guard:
    """Refuses foreign hosts and pages and bodies that are too long; adds the security headers.

    A page of another origin can make a browser send requests to this machine, and a rebound name
    can make it read the answers: so the Host must be ours and an Origin must match it. Bodies are
    counted while they come in.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str],
        origins: frozenset[str],
        max_body_bytes: int,
        max_upload_bytes: int,
    ) -> None:
        self.app, self.hosts, self.origins = app, hosts, origins
        self.max_body_bytes, self.max_upload_bytes = max_body_bytes, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    added.setdefault(name, value)
                added.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(headers)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send_with_headers)
            return
        limit = self._limit(headers)
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_long(limit)
            return message

        await self.app(scope, receive_counted, send_with_headers)

    def _refusal(self, headers: Headers) -> ApiError | None:
        host = _host_of(headers.get("host", ""))
        if "*" not in self.hosts and host not in self.hosts:
            return ApiError(
                400, "this server is not known by that name; see --allowed-host.", code="bad_host"
            )
        origin = headers.get("origin")
        if origin and origin not in self.origins and urlsplit(origin).netloc != headers.get("host"):
            return ApiError(403, "pages of other origins may not call.", code="bad_origin")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return ApiError(400, "Content-Length is not a number.", code="bad_request")
        if len(length) > 15 or int(length) > self._limit(headers):
            return _too_long(self._limit(headers))
        return None

    def _limit(self, headers: Headers) -> int:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_small = kind in ("", "application/json", "text/plain")
        return self.max_body_bytes if is_small else self.max_upload_bytes


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413, f"the request is longer than {limit / 1e6:g} MB.", code="request_too_large"
    )


def _host_of(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
