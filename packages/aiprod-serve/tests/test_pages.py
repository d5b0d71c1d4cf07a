"""What the studio asks the server for: its files, its policy, choices, recipes, retakes."""

import re

from fastapi.testclient import TestClient

from aiprod_pipelines.presets import PRESETS
from aiprod_serve import security
from aiprod_serve.pages import FOLDER

PROMPT = "a red ball bounces"


def test_the_root_leads_to_the_studio_whose_policy_allows_nothing_from_elsewhere(
    client: TestClient,
):
    page = client.get("/")
    assert (page.status_code, page.url.path) == (200, "/studio/")
    assert page.headers["content-type"].startswith("text/html")
    policy = dict(
        part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    allowed = {source for sources in policy.values() for source in sources.split()}
    assert allowed == {"'none'", "'self'", "blob:", "data:"}
    assert policy["script-src"] == policy["style-src"] == "'self'"
    again = client.get("/studio/", headers={"if-none-match": page.headers["etag"]})
    assert again.status_code == 304


def test_the_studios_files_are_served_and_name_no_other_host(client: TestClient):
    for path in FOLDER.iterdir():
        assert client.get(f"/studio/{path.name}").content == path.read_bytes()
        hosts = set(re.findall(r"//([\w-]+\.[\w.-]+)", path.read_text()))
        assert hosts <= {"www.w3.org"}, path  # the name space of SVG, which is never fetched


def test_nothing_beside_the_studios_files_is_served(client: TestClient):
    for path in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "nothing.js"):
        answer = client.get(f"/studio/{path}")
        assert answer.status_code == 404, path
        assert "error" in answer.json()


def test_choices_are_what_the_model_can_be_asked_for(client: TestClient):
    choices = client.get("/v1/models/tiny/choices").json()
    assert choices["camera_motions"] == ["dolly-in"]
    names = [choice["name"] for choice in choices["pipelines"]]
    assert "one-stage" in names and "retake" in names
    assert "ic-lora" not in names and choices["controls"] == []
    retake = next(choice for choice in choices["pipelines"] if choice["name"] == "retake")
    assert retake["needs"] == ["source"]
    assert choices["presets"][0]["name"] == "draft"
    assert {preset["name"] for preset in choices["presets"]} <= set(PRESETS) - {"low-memory"}
    for preset in choices["presets"]:
        body = {"prompt": PROMPT, **preset["settings"]}
        answer = client.post("/v1/videos", json=body)
        assert answer.status_code == 200, answer.text
        frame = preset["frame"]
        assert answer.json()["size"] == f"{frame['width']}x{frame['height']}"
    assert client.get("/v1/models/other/choices").status_code == 404


def test_a_clip_tells_its_recipe_and_can_be_retaken_by_its_id(client: TestClient, finish):
    made = client.post("/v1/videos", json={"prompt": PROMPT, "seed": 3, "num_frames": 9}).json()
    early = client.post(
        "/v1/videos", json={"prompt": PROMPT, "source": {"video_id": made["id"]}, "end_time": 0.2}
    )
    if early.status_code != 200:  # it may be finished already
        assert early.json()["error"]["param"] == "source"
    assert finish(made["id"])["status"] == "completed"
    recipe = client.get(f"/v1/videos/{made['id']}/recipe").json()
    assert recipe["pipeline"] == "one-stage"
    assert (recipe["request"]["prompt"], recipe["request"]["seed"]) == (PROMPT, 3)
    body = {"prompt": "a blue ball", "source": {"video_id": made["id"]}, "start_time": 0.1}
    retake = client.post("/v1/videos", json=body).json()
    assert retake["remixed_from_video_id"] == made["id"]
    done = finish(retake["id"])
    assert (done["status"], done["pipeline"]) == ("completed", "retake")
    assert done["seconds"] == made["seconds"]


def test_a_clip_of_another_key_is_no_source(client: TestClient, finish):
    made = client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 9}).json()["id"]
    assert finish(made)["status"] == "completed"
    _, text = security.create_key(client.app.state.context.store.database, "n")
    client.app.state.context.gatekeeper._read_at = 0.0  # noticed at once
    key = {"authorization": f"Bearer {text}"}
    body = {"prompt": PROMPT, "source": {"video_id": made}}
    refused = client.post("/v1/videos", json=body, headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_such_file")
    assert client.get(f"/v1/videos/{made}/recipe", headers=key).status_code == 404
    assert client.get("/studio/").status_code == 200  # the page itself asks for a key
    assert client.get("/v1/models/tiny/choices").status_code == 401
