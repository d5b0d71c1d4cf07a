"""Requests from the OpenAPI document and damaged media: refused with 4xx, and all lives on.

`make test-serve` runs many times as many of them (AIPROD_FUZZ_REQUESTS, AIPROD_FUZZ_UPLOADS).
"""

import io
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies
import numpy as np
import pytest
import schemathesis
from fastapi.testclient import TestClient
from PIL import Image
from schemathesis import GenerationMode

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_serve.app import create_app
from aiprod_serve.probe import Limits, Prober
from aiprod_serve.settings import Settings
from aiprod_serve.worker import Worker

NUM_REQUESTS = int(os.environ.get("AIPROD_FUZZ_REQUESTS", "150"))
NUM_UPLOADS = int(os.environ.get("AIPROD_FUZZ_UPLOADS", "60"))
LIMITS = Limits(max_pixels=512 * 512, max_duration_s=5.0, timeout_s=20.0, memory_mb=2048)


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    made = Prober(LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def originals(family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small whole files of every kind."""
    folder = tmp_path_factory.mktemp("originals")
    y, x = np.mgrid[:32, :48]
    frame = np.stack([x * 5, y * 7, x + y], -1).astype(np.uint8)
    files: dict[str, bytes] = {}
    for kind in ("png", "jpeg", "webp", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format=kind)
        files[kind] = buffer.getvalue()
    media.write_video(folder / "a.mp4", [np.stack([frame] * 5)], 12, audio=family.tone(0.4))
    for suffix in ("wav", "flac", "m4a"):
        media.write_audio(folder / f"a.{suffix}", family.tone(0.3))
    files |= {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}
    return files


def test_whole_files_of_every_kind_are_taken(
    prober: Prober, originals: dict[str, bytes], tmp_path: Path
):
    kinds = {}
    for suffix, content in originals.items():
        path = tmp_path / "upload"
        path.write_bytes(content)
        kinds[suffix] = prober.probe(path).kind
    images, sounds = ("png", "jpeg", "webp", "bmp"), ("wav", "flac", "m4a")
    assert kinds == {
        **dict.fromkeys(images, "image"), **dict.fromkeys(sounds, "audio"), "mp4": "video",
    }  # fmt: skip


def test_an_image_is_kept_as_our_own_encoders_file(prober: Prober, tmp_path: Path):
    path = tmp_path / "upload"
    image = Image.new("RGB", (8, 6), "red")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    image.save(path, format="JPEG", exif=exif)
    path.write_bytes(path.read_bytes() + b"<script>trailing</script>")
    found = prober.probe(path)
    assert (found.suffix, found.width, found.height) == (".png", 8, 6)
    kept = path.read_bytes()
    assert kept.startswith(b"\x89PNG") and b"home" not in kept and b"script" not in kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n", "not an image"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not an image"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            "not",
        ),
        (b"MZ" + bytes(100), "not an image"),
        (bytes(1000), "not an image"),
    ],
)
def test_what_names_other_files_or_is_no_media_is_refused(
    prober: Prober, tmp_path: Path, content: bytes, message: str
):
    path = tmp_path / "upload"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        prober.probe(path)


def test_files_beyond_the_limits_are_refused(prober: Prober, family, tmp_path: Path):
    path = tmp_path / "upload"
    Image.new("L", (3000, 3000)).save(path, format="PNG")  # a bomb: little to send, much to hold
    with pytest.raises(InputError, match=r"too large|more than"):
        prober.probe(path)
    media.write_audio(tmp_path / "long.wav", family.tone(7.0))
    with pytest.raises(InputError, match="longer than 5 s"):
        prober.probe(tmp_path / "long.wav")


def test_a_probe_that_takes_too_long_is_ended_and_the_next_file_is_read(
    originals: dict[str, bytes], tmp_path: Path
):
    slow = Prober(replace(LIMITS, timeout_s=0.0))
    path = tmp_path / "upload"
    path.write_bytes(originals["mp4"])
    with pytest.raises(InputError, match="takes longer"):
        slow.probe(path)
    slow.limits = LIMITS
    assert slow.probe(path).kind == "video"
    slow.close()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, repeated, shuffled or with its sizes overwritten."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, len(data)))
        match draw.randrange(6):
            case 0:
                del data[place:]
            case 1:
                for _ in range(draw.randint(1, 40)):
                    data[draw.randrange(len(data))] = draw.randrange(256) if data else 0
            case 2:
                data[place : place + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            case 3:
                data[place:place] = data[: draw.randint(1, 200)]
            case 4:
                del data[place : place + draw.randint(1, 50)]
            case 5:
                data[4:64] = draw.randbytes(min(60, max(0, len(data) - 4)))
        if not data:
            break
    return bytes(data)


def read_whole(path: Path, found: dict[str, Any]) -> None:
    """As pipelines read it."""
    if found["kind"] == "image":
        media.read_image(path)
    if found["kind"] == "video":
        assert any(frame.size for frame in media.read_frames(path))
    if found["has_audio"]:
        media.read_audio(path)


def test_damaged_uploads_never_break_the_server(
    settings: Settings, client: TestClient, originals: dict[str, bytes]
):
    draw = random.Random(1)
    names = sorted(originals)
    num_refused = num_taken = 0
    while num_refused < NUM_UPLOADS:
        name = names[(num_refused + num_taken) % len(names)]
        answer = client.post("/v1/files", files={"file": damaged(originals[name], draw)})
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] == "invalid_file"
            num_refused += 1
            continue
        # Some damage leaves a file that plays: a worker must be able to read it.
        assert answer.status_code == 200, answer.text
        file = answer.json()
        read_whole(settings.data_dir / "uploads" / "anyone" / file["filename"], file["media"])
        client.delete(f"/v1/files/{file['id']}")
        num_taken += 1
    assert num_taken < 2 * NUM_UPLOADS
    whole = client.post("/v1/files", files={"file": originals["mp4"]})
    assert whole.status_code == 200
    assert not list((settings.data_dir / "uploads").glob("*/.*"))


@pytest.fixture(scope="module")
def live_app(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """The app with a worker beside it; clips are small, few wait, nothing waits long."""
    folder = tmp_path_factory.mktemp("fuzz")
    before = os.getcwd()
    os.chdir(folder)
    settings = Settings(
        data_dir=folder,
        models={"tiny": str(tiny_model)},
        max_queue=4,
        max_pixels=64 * 64,
        max_clip_s=2.0,
        max_steps=3,
        sync_timeout_s=20.0,
        allowed_hosts=("testserver",),
    )
    app = create_app(settings)
    worker = Worker(settings, "fuzz/0", "cpu")
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield app
    assert thread.is_alive()  # nothing that came in has ended the worker
    worker.stop()
    thread.join()
    os.chdir(before)


# No worker is there; a clip was not made in the time that the client waits. Anywhere else a 503
# would be a failing disk or database, which is no answer here.
MAY_ANSWER = {"/ready": 503} | {
    f"/v1/{name}": 504 for name in ("text-to-video", "image-to-video", "audio-to-video", "retake")
}


def test_no_request_that_the_document_allows_or_forbids_is_a_server_error(live_app):
    document = schemathesis.openapi.from_asgi("/openapi.json", live_app)
    operations = [result.ok() for result in document.get_all_operations()]
    sent = 0

    def send(case: schemathesis.Case) -> None:
        nonlocal sent
        sent += 1
        answer = case.call(timeout=60)
        assert answer.status_code < 500 or answer.status_code == MAY_ANSWER.get(case.path), (
            f"{case.method} {case.path}: {answer.status_code} {answer.text}"
        )
        if 400 <= answer.status_code < 500:
            assert "error" in answer.json(), answer.text

    for operation in operations:
        both = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)
        examples = hypothesis.settings(
            max_examples=max(1, NUM_REQUESTS // len(operations)),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        examples(hypothesis.given(hypothesis.strategies.one_of(*both))(send))()
    assert sent >= NUM_REQUESTS // 2
