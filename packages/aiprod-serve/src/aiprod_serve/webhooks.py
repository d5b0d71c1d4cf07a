"""Webhooks, signed as Standard Webhooks: https://www.standardwebhooks.com.

The operator names the receivers (`aiprod serve webhooks add URL`); clients cannot, because a URL
from a client would let it reach whatever the server can. An event is stored with the change that
it tells of and sent afterwards, again and again until it is received, in growing intervals.
"""

import base64
import json
import logging
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httpx
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from standardwebhooks import Webhook

from aiprod_core.errors import InputError
from aiprod_serve.database import Database, metadata

logger = logging.getLogger(__name__)

# Seconds until the next try; after the last the event is dropped. About 28 hours together.
RETRY_AFTER_S = (5, 30, 120, 600, 3600, 6 * 3600, 20 * 3600)
TIMEOUT_S = 10.0
BATCH = 50

endpoints = sa.Table(
    "webhook_endpoints",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("secret", sa.Text, nullable=False),  # needed in the clear to sign with
    sa.Column("owner", sa.String(40)),  # only this key's jobs; null = all
)
deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("endpoint", sa.String(40), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("num_tries", sa.Integer, nullable=False, default=0),
    sa.Column("next_at", sa.Float, nullable=False, index=True),
)


@dataclass(frozen=True)
class Endpoint:
    id: str
    url: str
    secret: str
    owner: str | None


def add_endpoint(database: Database, url: str, owner: str | None = None) -> Endpoint:
    """Registers a receiver and makes its signing secret. Raises InputError for another scheme."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url}: a webhook is sent to an http:// or https:// address.")
    # 24 random bytes in the standard's own form.
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
    endpoint = Endpoint(f"we_{secrets.token_hex(8)}", url, secret, owner)
    with database.writing() as connection:
        connection.execute(endpoints.insert().values(**endpoint.__dict__))
    return endpoint


def list_endpoints(database: Database) -> list[Endpoint]:
    with database.reading() as connection:
        return [Endpoint(**row._mapping) for row in connection.execute(sa.select(endpoints))]


def remove_endpoint(database: Database, endpoint_id: str) -> None:
    with database.writing() as connection:
        connection.execute(deliveries.delete().where(deliveries.c.endpoint == endpoint_id))
        query = endpoints.delete().where(endpoints.c.id == endpoint_id)
        if not connection.execute(query).rowcount:
            raise InputError(f"{endpoint_id}: no such webhook; `aiprod serve webhooks list`.")


def enqueue(connection: Connection, event: str, job_id: str, owner: str) -> None:
    """Stores an event for every receiver, within the caller's transaction."""
    is_meant = sa.or_(endpoints.c.owner.is_(None), endpoints.c.owner == owner)
    for endpoint_id in connection.scalars(sa.select(endpoints.c.id).where(is_meant)).all():
        now = time.time()
        event_id = f"evt_{secrets.token_hex(12)}"
        body = {
            "id": event_id,
            "object": "event",
            "type": event,
            "created_at": int(now),
            "timestamp": datetime.fromtimestamp(now, UTC).isoformat(),
            "data": {"id": job_id},
        }
        connection.execute(
            deliveries.insert().values(
                id=event_id, endpoint=endpoint_id, body=json.dumps(body), next_at=now
            )
        )


def deliver_due(database: Database, client: httpx.Client) -> int:
    """Sends what is due, and returns how many were received. A receiver answers with any 2xx."""
    query = (
        sa.select(deliveries, endpoints.c.url, endpoints.c.secret)
        .join(endpoints, deliveries.c.endpoint == endpoints.c.id)
        .where(deliveries.c.next_at <= time.time())
        .order_by(deliveries.c.next_at)
        .limit(BATCH)
    )
    with database.reading() as connection:
        due = connection.execute(query).all()
    received = 0
    for row in due:
        is_received = _send(client, row.id, row.url, row.secret, row.body)
        mine = deliveries.c.id == row.id
        is_last = row.num_tries >= len(RETRY_AFTER_S)
        with database.writing() as connection:
            if is_received or is_last:
                connection.execute(deliveries.delete().where(mine))
            else:
                next_at = time.time() + RETRY_AFTER_S[row.num_tries]
                values = {"num_tries": row.num_tries + 1, "next_at": next_at}
                connection.execute(deliveries.update().where(mine).values(**values))
        if not is_received and is_last:
            logger.warning("webhook %s to %s was never received", row.id, row.endpoint)
        received += is_received
    return received


def _send(client: httpx.Client, event_id: str, url: str, secret: str, body: str) -> bool:
    now = datetime.now(UTC)
    headers = {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign(event_id, now, body),
    }
    try:
        answer = client.post(url, content=body, headers=headers, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        logger.info("webhook %s: %s", event_id, type(error).__name__)
        return False
    return answer.is_success
