"""LTX's public API as its clients use it: a clip in the answer, or a job to ask after."""

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from aiprod_pipelines import media
from aiprod_pipelines.recipe import read_recipe

PROMPT = "a red ball bounces"
Finish = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def clip(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 frames of 48x32 at 12 a second, with a tone."""
    import numpy as np

    t, y, x = np.mgrid[:13, :32, :48]
    path = tmp_path_factory.mktemp("clip") / "source.mp4"
    frames = np.stack([x * 4, y * 5, t * 12], -1).astype(np.uint8)
    media.write_video(path, [frames], 12, audio=family.tone(13 / 12))
    return path


@pytest.fixture(scope="module")
def sound(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "tone.wav"
    media.write_audio(path, family.tone(0.75))
    return path


def data_uri(path: Path) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"


def upload(client: TestClient, path: Path) -> str:
    """In LTX's two steps."""
    place = client.post("/v1/upload").json()
    put = client.put(
        place["upload_url"], content=path.read_bytes(), headers=place["required_headers"]
    )
    assert put.status_code == 200, put.text
    return place["storage_uri"]


def saved(answer, tmp_path: Path) -> Path:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "video/mp4" and answer.headers["x-request-id"]
    path = tmp_path / "answer.mp4"
    path.write_bytes(answer.content)
    return path


def test_text_to_video_answers_with_the_clip_on_the_models_grid(
    client: TestClient, worker, tmp_path: Path
):
    body = {"prompt": PROMPT, "model": "tiny", "duration": 1, "resolution": "70x42", "fps": 10}
    info = media.probe(saved(client.post("/v1/text-to-video", json=body), tmp_path))
    assert (info.width, info.height, info.num_frames, info.fps) == (72, 40, 9, 10)


def test_audio_to_video_is_as_long_as_its_sound(
    client: TestClient, worker, sound: Path, tmp_path: Path
):
    body = {"prompt": PROMPT, "audio_uri": upload(client, sound), "resolution": "48x32"}
    path = saved(client.post("/v1/audio-to-video", json=body), tmp_path)
    assert media.probe(path).num_frames == 9  # 0.75 s at 12
    assert read_recipe(path)["pipeline"] == "audio-to-video"


def test_retake_remakes_the_span_and_keeps_the_rest(
    client: TestClient, worker, clip: Path, tmp_path: Path
):
    body = {
        "prompt": PROMPT, "video_uri": data_uri(clip), "start_time": 0.5, "duration": 60,
        "mode": "replace_video",
    }  # fmt: skip
    path = saved(client.post("/v1/retake", json=body), tmp_path)
    request = read_recipe(path)["request"]
    assert (request["start_time"], request["modality"]) == (0.5, "video")
    assert request["end_time"] == pytest.approx(13 / 12, abs=0.05)  # cut to the clip
    assert not Path(request["source"]).is_absolute()  # where the server keeps it is its own affair


def test_asynchronous_jobs_are_accepted_asked_after_and_fetched(
    client: TestClient, finish: Finish, clip: Path, tmp_path: Path
):
    uri = upload(client, clip)
    for endpoint, body in (
        ("text-to-video", {"prompt": PROMPT}),
        ("extend", {"video_uri": uri, "duration": 0.5}),
    ):
        accepted = client.post(f"/v2/{endpoint}", json=body)
        assert accepted.status_code == 202, accepted.text
        job = accepted.json()
        assert job["status"] == "pending"
        finish(job["id"])
        job = client.get(f"/v2/{endpoint}/{job['id']}").json()
        assert job["status"] == "completed", job
        path = saved(client.get(job["result"]["video_url"]), tmp_path)
    assert media.probe(path).num_frames > 13


def test_a_failed_generation_is_told_as_failed(client: TestClient, store):
    job = client.post("/v2/text-to-video", json={"prompt": PROMPT}).json()
    store.fail(store.claim("w", ["tiny"], lease_s=1), "out_of_memory", "out of memory.")
    told = client.get(f"/v2/text-to-video/{job['id']}").json()
    assert (told["status"], told["error"]["code"]) == ("failed", "out_of_memory")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("text-to-video", {"prompt": PROMPT, "guidance": 3}, "unknown field guidance"),
        ("text-to-video", {"prompt": PROMPT, "duration": 600}, "at most 60"),
        ("image-to-video", {"prompt": PROMPT, "image_uri": "https://x.example/a.png"}, "fetched"),
        ("image-to-video", {"prompt": PROMPT, "image_uri": "file:///etc/passwd"}, "fetched"),
        ("image-to-video", {"prompt": PROMPT, "image_uri": "data:;base64,!!"}, "base64"),
        (
            "retake",
            {"video_uri": "data:;base64,aGVsbG8=", "start_time": 0, "duration": 1},
            "not an",
        ),
    ],
)
def test_what_ltx_clients_get_wrong_is_said_in_a_sentence(
    client: TestClient, path: str, body: dict[str, Any], message: str
):
    answer = client.post(f"/v2/{path}", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_the_device(client: TestClient, server: str, store):
    import httpx

    body = {"prompt": PROMPT, "num_inference_steps": 200, "duration": 10}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server}/v1/text-to-video", json=body, timeout=1.5)
    deadline = time.monotonic() + 60
    while not (page := store.page(None, limit=5)) or not page[0].is_finished:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [job.status for job in page] == ["cancelled"]
