"""Events, previews, live streams, webhooks and metrics of jobs that are really made."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from PIL import Image
from standardwebhooks import Webhook, WebhookVerificationError

from aiprod_pipelines import media
from aiprod_serve import streams, webhooks
from aiprod_serve import worker as workers
from aiprod_serve.jobs import JobStore

PROMPT = "a red ball bounces"
Finish = Callable[[str], dict[str, Any]]


def create(client: TestClient, **fields: Any) -> str:
    return client.post("/v1/videos", json={"prompt": PROMPT, **fields}).json()["id"]


def events(text: str) -> list[tuple[str, Any]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if block[:1] != ":"]
    return [(name[len("event: ") :], json.loads(data[len("data: ") :])) for name, data in blocks]


def test_events_tell_the_progress_show_previews_and_end_with_the_result(
    client: TestClient, worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workers, "PREVIEW_EVERY_S", 0.0)
    monkeypatch.setattr(workers, "PREVIEW_SHARE", 1.0)
    monkeypatch.setattr(workers, "HEARTBEAT_S", 0.01)
    for poll in ("POLL_S", "POLL_QUEUED_S"):  # the tiny model is done within one usual look
        monkeypatch.setattr(streams, poll, 0.01)
    video = create(client, num_inference_steps=60)
    told = events(client.get(f"/v1/videos/{video}/events").text)
    percents = [data["progress"] for name, data in told if name == "progress"]
    assert percents == sorted(percents) and len(set(percents)) > 1
    assert {data["stage"] for name, data in told if name == "progress"} >= {"denoise"}
    name, last = told[-1]
    assert (name, last["status"], last["progress"]) == ("completed", "completed", 100)
    previews = [data["image"] for name, data in told if name == "preview"]
    assert previews
    image = Image.open(io.BytesIO(base64.b64decode(previews[-1].partition(",")[2])))
    assert image.size == (48, 32)


def test_events_of_a_finished_job_are_its_end_alone(client: TestClient, finish: Finish):
    video = create(client)
    finish(video)
    assert [name for name, _ in events(client.get(f"/v1/videos/{video}/events").text)] == [
        "completed"
    ]


def test_a_live_stream_is_the_clip_that_is_kept(
    client: TestClient, server: str, finish: Finish, tmp_path: Path
):
    video = create(client, stream=True, num_frames=49)
    with httpx.stream("GET", f"{server}/v1/videos/{video}/stream", timeout=60) as answer:
        assert answer.headers["content-type"] == "video/mp4"
        live = b"".join(answer.iter_bytes())
    assert finish(video)["status"] == "completed"
    assert live == client.get(f"/v1/videos/{video}/content").content
    (tmp_path / "live.mp4").write_bytes(live)
    assert media.probe(tmp_path / "live.mp4").num_frames == 49


def test_a_job_that_is_not_streamed_says_how_to_ask_for_it(client: TestClient):
    answer = client.get(f"/v1/videos/{create(client)}/stream")
    assert answer.status_code == 409 and "stream: true" in answer.json()["error"]["message"]


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Any], list[int]]]:
    """An address, what it got, and the statuses that it answers with before 200."""
    got: list[Any] = []
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            got.append((dict(self.headers), body))
            self.send_response(statuses.pop(0) if statuses else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/hook", got, statuses
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_finished_job_is_told_to_webhooks_with_a_signature_that_only_its_secret_makes(
    client: TestClient, store: JobStore, finish: Finish, receiver
):
    url, got, _ = receiver
    endpoint = webhooks.add_endpoint(store.database, url)
    video = create(client)
    finish(video)
    with httpx.Client() as http:
        assert webhooks.deliver_due(store.database, http) == 1
        assert webhooks.deliver_due(store.database, http) == 0
    ((headers, body),) = got
    event = Webhook(endpoint.secret).verify(body, {k.lower(): v for k, v in headers.items()})
    assert (event["type"], event["data"]) == ("video.completed", {"id": video})
    other = webhooks.add_endpoint(store.database, url).secret
    with pytest.raises(WebhookVerificationError):
        Webhook(other).verify(body, {k.lower(): v for k, v in headers.items()})
    OpenAI(api_key="x").webhooks.verify_signature(body, headers, secret=endpoint.secret)


def test_an_event_that_is_not_received_is_sent_again_later(
    client: TestClient, store: JobStore, receiver, monkeypatch: pytest.MonkeyPatch
):
    url, got, statuses = receiver
    statuses += [500, 302]
    monkeypatch.setattr(webhooks, "RETRY_AFTER_S", (0.01, 0.01, 0.01))
    webhooks.add_endpoint(store.database, url)
    client.post(f"/v1/videos/{create(client)}/cancel")
    with httpx.Client() as http:
        received = []
        for _ in range(4):
            received.append(webhooks.deliver_due(store.database, http))
            time.sleep(0.02)
    assert received == [0, 0, 1, 0]
    assert len({headers["webhook-id"] for headers, _ in got}) == 1  # by which doubles are known


def test_metrics_count_jobs_and_requests_by_route(client: TestClient, finish: Finish):
    video = finish(create(client))["id"]
    assert client.post("/v1/videos", json={"prompt": ""}).status_code == 400
    text = client.get("/metrics").text
    assert 'aiprod_jobs{status="completed"} 1.0' in text
    assert "aiprod_submitted_total 1.0" in text and "aiprod_workers 1.0" in text
    assert 'aiprod_http_requests_total{method="POST",route="/v1/videos",status="400"} 1.0' in text
    assert video not in text  # no series a clip


def test_a_server_is_ready_when_a_worker_is_there(client: TestClient, store: JobStore):
    assert client.get("/ready").status_code == 503
    store.register_worker("w", "cpu")
    assert client.get("/ready").json() == {"status": "ready", "workers": 1}


def test_models_are_listed_with_what_a_page_needs(client: TestClient):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["grid"] == {"time": 4, "height": 8, "width": 8}
    assert model["defaults"]["num_frames"] == 9 and model["camera_motions"] == ["dolly-in"]
    assert "one-stage" in model["pipelines"] and "two-stages" not in model["pipelines"]
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/none").status_code == 404
