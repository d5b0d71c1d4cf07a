"""Who gets in, how far, and what comes back to a browser."""

import io
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_serve import security
from aiprod_serve.app import create_app
from aiprod_serve.cli import serve_app
from aiprod_serve.settings import Settings
from aiprod_serve.supervisor import Supervisor

PROMPT = "a red ball bounces"


def make_key(client: TestClient, *scopes: str, rate: int = 600) -> dict[str, str]:
    database = client.app.state.context.store.database
    _, text = security.create_key(database, "n", scopes or security.DEFAULT_SCOPES, rate)
    client.app.state.context.gatekeeper._read_at = 0.0  # noticed at once
    return {"authorization": f"Bearer {text}"}


def test_from_the_first_key_on_every_request_needs_one(client: TestClient):
    assert client.get("/v1/videos").status_code == 200
    key = make_key(client)
    for headers in (
        {},
        {"authorization": "Bearer no"},
        {"authorization": key["authorization"][:-1]},
    ):
        for path in ("/v1/videos", "/v1/models", "/metrics", "/v1/videos/x/content"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/videos", headers=key).status_code == 200
    assert client.get("/health").status_code == 200


def test_a_key_does_what_its_scopes_say(client: TestClient):
    reader, maker = make_key(client, "read"), make_key(client, "generate")
    body = {"prompt": PROMPT}
    assert client.post("/v1/videos", json=body, headers=reader).status_code == 403
    assert client.post("/v1/videos", json=body, headers=maker).status_code == 200
    assert client.get("/v1/videos", headers=maker).status_code == 403
    assert client.get("/metrics", headers=reader).status_code == 403
    assert client.get("/metrics", headers=make_key(client, "metrics")).status_code == 200


def test_keys_do_not_see_each_others_clips_or_uploads(client: TestClient):
    a, b = make_key(client), make_key(client)
    video = client.post("/v1/videos", json={"prompt": PROMPT}, headers=a).json()["id"]
    for method, path in (
        ("GET", f"/v1/videos/{video}"),
        ("GET", f"/v1/videos/{video}/content"),
        ("GET", f"/v1/videos/{video}/events"),
        ("POST", f"/v1/videos/{video}/cancel"),
        ("DELETE", f"/v1/videos/{video}"),
        ("GET", f"/v2/text-to-video/{video}"),
    ):
        assert client.request(method, path, headers=b).status_code == 404, path
    assert client.get("/v1/videos", headers=b).json()["data"] == []
    wav = wave_file()
    uploaded = client.post("/v1/files", files={"file": wav}, headers=a).json()["id"]
    body = {"prompt": PROMPT, "audio": {"file_id": uploaded}}
    refused = client.post("/v1/videos", json=body, headers=b)
    assert refused.json()["error"]["code"] == "no_such_file"
    assert client.post("/v1/videos", json=body, headers=a).status_code == 200


def test_requests_above_a_keys_rate_are_told_when_to_come_back(client: TestClient):
    key = make_key(client, rate=3)
    answers = [client.get("/v1/videos", headers=key) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 21


def test_secrets_are_nowhere_in_the_database(client: TestClient, settings: Settings):
    text = make_key(client)["authorization"].removeprefix("Bearer ")
    secret = text.split("_", 2)[2]
    with sqlite3.connect(settings.data_dir / "jobs.sqlite3") as connection:
        assert secret not in "\n".join(connection.iterdump())


def test_the_command_line_makes_lists_and_revokes_keys(tmp_path: Path):
    def run(*arguments: str) -> str:
        place = ["--data-dir", str(tmp_path)]
        result = CliRunner().invoke(serve_app, [*arguments, *place])
        assert result.exit_code == 0, result.output
        return result.stdout

    text = run("keys", "create", "laptop", "--scope", "read", "--rate", "9").strip()
    assert text.startswith("aiprod_")
    (key,) = json.loads(run("keys", "list", "--json"))
    assert (key["name"], key["scopes"], key["rate"]) == ("laptop", ["read"], 9)
    run("keys", "revoke", key["id"])
    assert json.loads(run("keys", "list", "--json")) == []


def test_a_public_address_without_a_key_is_refused(settings: Settings):
    with pytest.raises(InputError, match="there is no API key"):
        Supervisor(replace(settings, host="0.0.0.0", port=0))
    open_to_all = replace(settings, host="0.0.0.0", port=0)
    database = Supervisor(replace(settings, port=0)).database
    security.create_key(database, "n")
    Supervisor(open_to_all).socket.close()


def test_other_names_and_pages_of_other_origins_are_refused(client: TestClient):
    rebound = client.get("/v1/videos", headers={"host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (400, "bad_host")
    body = {"prompt": PROMPT}
    foreign = client.post("/v1/videos", json=body, headers={"origin": "https://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "bad_origin")
    own = client.post("/v1/videos", json=body, headers={"origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


def test_cors_is_for_named_origins(settings: Settings):
    app = create_app(replace(settings, cors_origins=("https://ours.example",)))
    client = TestClient(app, base_url="http://127.0.0.1")
    ours = client.get("/v1/videos", headers={"origin": "https://ours.example"})
    assert ours.headers["access-control-allow-origin"] == "https://ours.example"
    assert client.get("/v1/videos", headers={"origin": "https://x.example"}).status_code == 403


def test_answers_carry_the_security_headers_refusals_too(client: TestClient):
    for path in ("/health", "/v1/videos", "/nowhere", "/v1/videos/x"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in headers


def test_a_body_is_refused_while_it_comes_in(settings: Settings):
    app = create_app(replace(settings, max_body_mb=0.001, max_upload_mb=0.01))
    client = TestClient(app, base_url="http://127.0.0.1")
    read = 0

    def endless():
        nonlocal read
        while read < 10_000_000:
            read += 1000
            yield b"x" * 1000

    json_type = {"content-type": "application/json"}
    answer = client.post("/v1/videos", content=endless(), headers=json_type)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    form_type = {"content-type": "multipart/form-data; boundary=b"}
    head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    answer = client.post("/v1/files", content=head + b"x" * 20_000, headers=form_type)
    assert answer.status_code == 413
    assert not list((settings.data_dir / "uploads").glob("*/*"))


def wave_file() -> io.BytesIO:
    import wave

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\0\1" * 16000)
    buffer.seek(0)
    return buffer
