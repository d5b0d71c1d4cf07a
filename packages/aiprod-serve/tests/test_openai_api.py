"""OpenAI's videos API over the real worker: what clients of it send and get."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image

from aiprod_pipelines import media
from aiprod_pipelines.recipe import read_recipe
from aiprod_serve.app import create_app
from aiprod_serve.jobs import JobStore
from aiprod_serve.settings import Settings

PROMPT = "a red ball bounces"
Finish = Callable[[str], dict[str, Any]]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    y, x = np.mgrid[:48, :72]
    path = tmp_path / "picture.jpg"
    Image.fromarray(np.stack([x * 3, y * 5, 255 - x * 2], -1).astype(np.uint8)).save(path)
    return path


def create(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_video_is_queued_made_and_fetched(client: TestClient, finish: Finish, tmp_path: Path):
    video = create(client, seed=7, seconds="1", size="64x40")
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    done = finish(video["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    content = client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    (tmp_path / "got.mp4").write_bytes(content.content)
    info = media.probe(tmp_path / "got.mp4")
    assert f"{info.width}x{info.height}" == done["size"] == "64x40"
    assert info.num_frames == 13 and info.audio_codec == "aac"  # 4k+1 next to 12
    assert read_recipe(tmp_path / "got.mp4")["request"]["seed"] == 7


def test_the_unmodified_openai_client_creates_polls_downloads_lists_remixes_and_deletes(
    server: str, picture: Path, tmp_path: Path
):
    openai = OpenAI(api_key="none", base_url=f"{server}/v1")
    video = openai.videos.create(
        prompt=PROMPT, model="tiny", size="64x40", seconds="1", input_reference=picture,
        extra_body={"seed": 3},
    )  # fmt: skip
    video = openai.videos.poll(video.id, poll_interval_ms=50)
    assert video.status == "completed"
    openai.videos.download_content(video.id).write_to_file(tmp_path / "clip.mp4")
    assert media.probe(tmp_path / "clip.mp4").num_frames == 13
    still = openai.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(still)).format == "WEBP"

    other = openai.videos.remix(video.id, prompt="a blue ball bounces")
    other = openai.videos.poll(other.id, poll_interval_ms=50)
    assert other.remixed_from_video_id == video.id and other.size == video.size
    assert other.status == "completed"  # over the first one's picture
    assert [v.id for v in openai.videos.list(limit=1)] == [other.id, video.id]  # two pages
    assert openai.videos.delete(video.id).deleted
    with pytest.raises(NotFoundError):
        openai.videos.retrieve(video.id)


def test_openais_client_gets_its_own_errors(server: str):
    openai = OpenAI(api_key="none", base_url=f"{server}/v1", max_retries=0)
    with pytest.raises(BadRequestError) as error:
        openai.videos.create(prompt=PROMPT, extra_body={"sede": 7})
    assert error.value.body["param"] == "sede" and "unknown field" in error.value.body["message"]
    with pytest.raises(NotFoundError, match="model sora-2 is not served here; there is tiny"):
        openai.videos.create(prompt=PROMPT, model="sora-2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 12}, "4k+1; got 12, try 13"),
        ({"width": 45}, "width must be a multiple of 8; got 45, try 48"),
        ({"num_frames": 4001, "frame_rate": 1000}, "4001 frames are above this server's 3601"),
        ({"num_inference_steps": 500}, "500 steps are above this server's 200"),
        ({"pipeline": "one-stag"}, "try one-stage"),
        ({"sampler": "eulr"}, "try euler"),
        ({"prompt": ""}, "at least 1 character"),
        ({"size": "64"}, "pattern"),
        ({"seconds": "never"}, "seconds is above 0"),
        ({"seconds": "1", "num_frames": 9}, "give seconds or num_frames"),
        ({"size": "4096x4096"}, "above this server's"),
        ({"pipeline": "retake"}, "retake needs --source"),
        ({"input_reference": "/etc/passwd"}, "not fetched"),
        ({"input_reference": {"image_url": "http://127.0.0.1/a.png"}}, "not fetched"),
        ({"source": "aiprod://uploads/../../jobs.sqlite3"}, "not fetched"),
        ({"camera_motion": "jib_up"}, "there is dolly-in"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_is_queued(
    client: TestClient, store: JobStore, fields: dict[str, Any], message: str
):
    answer = client.post("/v1/videos", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert store.all_ids() == set()
    assert not list((store_root(client) / "inputs").iterdir())


def store_root(client: TestClient) -> Path:
    return client.app.state.context.settings.data_dir


def test_ranges_of_a_clip_are_served_and_join_to_the_whole(client: TestClient, finish: Finish):
    url = f"/v1/videos/{create(client)['id']}/content"
    finish(url.split("/")[3])
    whole = client.get(url).content
    first = client.get(url, headers={"range": "bytes=0-99"})
    rest = client.get(url, headers={"range": "bytes=100-"})
    assert (first.status_code, rest.status_code) == (206, 206)
    assert first.headers["content-range"] == f"bytes 0-99/{len(whole)}"
    assert first.content + rest.content == whole
    assert client.get(url, headers={"range": f"bytes={len(whole)}-"}).status_code == 416


def test_stills_show_the_clip_and_fit_a_page(client: TestClient, finish: Finish):
    video = finish(create(client, num_frames=25)["id"])
    url = f"/v1/videos/{video['id']}/content"
    thumbnail = Image.open(io.BytesIO(client.get(url, params={"variant": "thumbnail"}).content))
    sheet = Image.open(io.BytesIO(client.get(url, params={"variant": "spritesheet"}).content))
    assert thumbnail.size == (48, 32)
    assert sheet.size == (5 * 180, 4 * 120)  # 20 of 25 frames
    assert np.asarray(sheet).std() > 1


def test_a_clip_that_is_not_made_has_no_content(client: TestClient):
    video = create(client)
    answer = client.get(f"/v1/videos/{video['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_completed")


def test_one_idempotency_key_makes_one_job_and_refuses_another_request(client: TestClient):
    headers = {"idempotency-key": "k1"}
    first = client.post("/v1/videos", json={"prompt": PROMPT}, headers=headers).json()
    again = client.post("/v1/videos", json={"prompt": PROMPT}, headers=headers).json()
    assert first["id"] == again["id"]
    other = client.post("/v1/videos", json={"prompt": "rain"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert len(client.get("/v1/videos").json()["data"]) == 1


def test_the_same_upload_again_under_one_key_is_the_same_request(client: TestClient, picture: Path):
    def send() -> dict[str, Any]:
        with picture.open("rb") as file:
            return client.post(
                "/v1/videos",
                data={"prompt": PROMPT, "seed": "4"},
                files={"input_reference": file},
                headers={"idempotency-key": "k2"},
            ).json()

    assert send()["id"] == send()["id"]


def test_a_full_queue_says_when_to_come_back(settings: Settings):
    small = TestClient(create_app(replace(settings, max_queue=2)), base_url="http://localhost")
    codes = [small.post("/v1/videos", json={"prompt": PROMPT}).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    answer = small.post("/v1/videos", json={"prompt": PROMPT})
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "queue_full"


def test_later_places_in_the_queue_are_polled_more_seldom(client: TestClient):
    ids = [create(client)["id"] for _ in range(3)]
    waits = [
        int(client.get(f"/v1/videos/{video}").headers["openai-poll-after-ms"]) for video in ids
    ]
    assert waits == sorted(set(waits))


def test_pages_of_the_list_follow_each_other_without_gap_or_repeat(client: TestClient):
    ids = [create(client)["id"] for _ in range(5)]
    seen: list[str] = []
    after: dict[str, str] = {}
    for _ in range(3):
        page = client.get("/v1/videos", params={"limit": 2, "order": "asc", **after}).json()
        seen += [video["id"] for video in page["data"]]
        after = {"after": page["last_id"]}
    assert seen == ids and page["has_more"] is False
    newest_first = client.get("/v1/videos").json()["data"]
    assert [video["id"] for video in newest_first] == ids[::-1]


def test_a_queued_job_is_cancelled_at_once_and_stays_visible(client: TestClient, store: JobStore):
    video = create(client)
    cancelled = client.post(f"/v1/videos/{video['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert store.claim("w", ["tiny"], lease_s=1) is None
    assert client.get(f"/v1/videos/{video['id']}").json()["status"] == "cancelled"


def test_an_upload_is_named_by_later_requests(client: TestClient, finish: Finish, picture: Path):
    with picture.open("rb") as file:
        uploaded = client.post("/v1/files", files={"file": ("../../x.exe", file)}).json()
    assert uploaded["media"]["kind"] == "image" and uploaded["filename"].endswith(".png")
    body = {"images": [{"file": {"file_id": uploaded["id"]}, "frame": 8, "strength": 0.5}]}
    assert finish(create(client, **body)["id"])["status"] == "completed"


def test_camera_motion_adds_the_lora_beside_the_model(
    client: TestClient, finish: Finish, tmp_path: Path
):
    video = finish(create(client, camera_motion="dolly_in")["id"])
    (tmp_path / "c.mp4").write_bytes(client.get(f"/v1/videos/{video['id']}/content").content)
    (lora,) = read_recipe(tmp_path / "c.mp4")["request"]["loras"]
    assert lora["path"] == "tiny-lora-camera-control-dolly-in.safetensors"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_no_folder_of_the_server_is_named_in_a_clip_or_a_refusal(
    client: TestClient, finish: Finish, tiny_model: Path, tmp_path: Path, is_streamed: bool
):
    video = finish(create(client, camera_motion="dolly_in", stream=is_streamed)["id"])
    content = client.get(f"/v1/videos/{video['id']}/content").content
    folders = [str(tiny_model.parent), str(tmp_path)]
    assert not any(folder.encode() in content for folder in folders)
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "pipeline": "two-stages"})
    assert answer.status_code == 400 and "upscaler" in answer.text
    assert not any(folder in answer.text for folder in folders)
