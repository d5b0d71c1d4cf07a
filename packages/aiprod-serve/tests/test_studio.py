"""The studio in Chromium: what a person does on the page, on real servers.

Needs Debian's chromium and Playwright, which `make test-serve` installs.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from aiprod_serve import security

pytestmark = pytest.mark.browser

pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs pip install axe-playwright-python"
)
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PROMPT = "a red rubber ball bounces on the floor, with a thud at each bounce"
SLOW_MS = 240_000  # of a step that a model has to work for, on a machine that has more to do

NewPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[NewPage]:
    """Opens pages; in the end none of them has failed or asked another host for anything."""
    contexts, foreign, failures = [], set(), []

    def note(url: str, host: str) -> None:
        if urlsplit(url).scheme not in ("blob", "data") and urlsplit(url).netloc != host:
            foreign.add(url)

    def make(url: str, viewport: dict[str, int] = DESK, **options: Any) -> Page:
        context = browser.new_context(viewport=viewport, **options)  # pyright: ignore
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW_MS)
        page.on("request", lambda request: note(request.url, urlsplit(url).netloc))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(url)
        return page

    expect.set_options(timeout=SLOW_MS)
    yield make
    for context in contexts:
        context.close()
    assert foreign == set()
    assert failures == []


def generate(page: Page, prompt: str = PROMPT, steps: int = 2) -> None:
    """Fills the form and waits until the clip is on the stage."""
    page.get_by_label("Describe the clip").fill(prompt)
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Generate").click()
    wait_for_clip(page)


def wait_for_clip(page: Page) -> None:
    expect(page.get_by_role("group", name="Timeline")).to_be_visible()
    expect(page.locator(".surface[data-sound]")).to_be_visible()


def fact(page: Page, name: str) -> str:
    return page.locator(".facts div", has_text=name).locator("dd").inner_text()


# On nano, by the processes of `aiprod serve`.


def start(port: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "aiprod_pipelines.cli", "serve", "--model", "nano",
        "--port", str(port), "--data-dir", str(folder), "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + SLOW_MS / 1000
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return process
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    process.kill()
    raise AssertionError("never ready")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(60)


def test_a_clip_of_nano_is_made_played_retaken_and_found_again_after_a_restart(
    new_page: NewPage, tmp_path: Path
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(port, tmp_path)
    try:
        page = new_page(f"http://127.0.0.1:{port}")
        generate(page, steps=8)

        page.get_by_role("button", name="Play the clip").click()
        video = page.locator("video.picture")
        expect(page.get_by_role("button", name="Pause")).to_be_visible()
        page.wait_for_timeout(1000)
        played = video.evaluate(
            "v => [v.played.end(0), v.videoWidth, v.webkitDecodedFrameCount,"
            " v.webkitAudioDecodedByteCount, v.error]"
        )
        width = int(fact(page, "Size").split(" x ")[0])
        assert played[0] > 0 and played[1] == width and played[2] > 0 and played[3] > 0, played
        assert played[4] is None
        page.get_by_role("button", name="Pause").click()
        colours = page.locator(".surface .wave").evaluate(
            "c => new Set(new Uint32Array(c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        assert colours > 2  # bars are drawn

        box = page.locator(".surface").bounding_box()
        assert box is not None
        left, width, middle = box["x"], box["width"], box["y"] + box["height"] / 2
        page.mouse.move(left + 0.3 * width, middle)
        page.mouse.down()
        page.mouse.move(left + 0.6 * width, middle, steps=5)
        page.mouse.up()
        expect(page.locator(".span-text")).to_have_text("0.58 to 1.25 s")
        page.get_by_label("What happens there").fill(PROMPT.replace("red", "green"))
        page.get_by_role("button", name="Retake").click()
        expect(page.locator(".facts")).to_contain_text("retake")
        wait_for_clip(page)
        expect(page.locator(".takes-row li")).to_have_count(2)
        address = page.url

        stop(process)
        expect(page.locator("#server")).to_have_text("not reached, trying again")
        process = start(port, tmp_path)
        expect(page.locator("#server")).to_have_text("ready")
        page = new_page(address)
        wait_for_clip(page)
        expect(page.locator("#stage-title")).to_have_text(PROMPT.replace("red", "green"))
        expect(page.locator(".card-picture img")).to_have_count(2)
    finally:
        stop(process)


# On a tiny model, which makes noise, in this process.


def test_a_span_is_chosen_and_moved_by_keys(new_page: NewPage, server: str):
    page = new_page(server)
    generate(page)
    page.get_by_role("button", name="choose one here").press("Enter")
    start_edge, end_edge = (page.get_by_role("slider", name=f"Span {e}") for e in ("start", "end"))
    expect(start_edge).to_be_focused()
    before = float(start_edge.get_attribute("aria-valuenow") or 0)
    page.keyboard.press("ArrowLeft")
    assert float(start_edge.get_attribute("aria-valuenow") or 0) < before
    page.keyboard.press("Tab")
    expect(end_edge).to_be_focused()
    page.keyboard.press("End")
    duration = end_edge.get_attribute("aria-valuemax")
    expect(end_edge).to_have_attribute("aria-valuenow", str(duration))
    page.keyboard.press("Home")  # never before the other edge
    assert float(end_edge.get_attribute("aria-valuenow") or 0) >= before - 0.1
    page.keyboard.press("Escape")
    expect(start_edge).to_be_hidden()


def test_takes_are_rerolled_compared_and_deleted(new_page: NewPage, server: str):
    page = new_page(server)
    generate(page)
    first = fact(page, "Seed")
    page.get_by_role("button", name="Re-roll").click()
    expect(page.locator(".facts")).not_to_contain_text(first)
    wait_for_clip(page)
    page.get_by_role("link", name="Compare").click()
    expect(page.locator(".side video")).to_have_count(2)
    differences = page.get_by_role("region", name="Setting, A, B")
    expect(differences.get_by_role("rowheader")).to_have_text(["seed"])
    page.get_by_role("button", name="Play both").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.side video')].every(v => v.played.length)"
    )
    assert page.locator(".side video").evaluate_all("vs => vs.map(v => v.muted)") == [False, True]
    page.get_by_role("radio", name="Hear B").check()
    assert page.locator(".side video").evaluate_all("vs => vs.map(v => v.muted)") == [True, False]
    page.get_by_role("button", name="Close the comparison").click()
    wait_for_clip(page)
    page.get_by_text("Recipe", exact=True).click()
    expect(page.get_by_role("region", name="Setting, Value")).to_contain_text(PROMPT)
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete for good?").click()
    expect(page.locator(".card-item")).to_have_count(1)
    expect(page.locator("#stage")).to_be_hidden()


def test_a_clip_in_the_making_is_told_and_cancelled(new_page: NewPage, server: str):
    page = new_page(server)
    page.get_by_label("Describe the clip").fill(PROMPT)
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill("200")
    expect(page.get_by_label("Length")).to_be_enabled()
    page.get_by_label("Length").press("End")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#making-stage")).to_have_text("Denoising")
    expect(page.locator("#making-percent")).to_have_text(re.compile(r"[1-9]\d* %"))
    expect(page.locator("#announcer")).to_contain_text("queued")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#stage")).to_contain_text("This clip was cancelled.")
    expect(page.locator("#announcer")).to_contain_text("cancelled")


def test_a_wish_that_is_faster_than_the_server_waits_for_its_choices(
    new_page: NewPage, server: str
):
    page = new_page(server)
    held: list[Route] = []
    page.route("**/choices", lambda route: held.append(route))
    page.reload()
    page.get_by_label("Describe the clip").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_label("Length")).to_be_disabled()
    held[-1].continue_()  # one before belonged to the page before
    wait_for_clip(page)


def test_an_image_and_a_sound_are_shown_sent_and_gone_by(
    new_page: NewPage, server: str, client: TestClient, tmp_path: Path
):
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / "first.png")
    with wave.open(str(tmp_path / "hum.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\0\1" * 16000)
    (tmp_path / "bad.png").write_bytes(b"no image")
    page = new_page(server)
    page.locator("#image-file").set_input_files(tmp_path / "bad.png")
    expect(page.locator("#composer-error")).to_contain_text("bad.png:")
    page.locator("#image-file").set_input_files(tmp_path / "first.png")
    page.locator("#audio-file").set_input_files(tmp_path / "hum.wav")
    files = page.get_by_role("list", name="Added files")
    expect(files).to_contain_text("48 x 32")
    expect(files.get_by_role("img", name="Waveform of hum.wav")).to_be_visible()
    assert files.get_by_role("img", name="first.png").evaluate("i => i.naturalWidth") == 48
    generate(page)
    video_id = urlsplit(page.url).fragment
    request = client.get(f"/v1/videos/{video_id}/recipe").json()["request"]
    assert [image["frame"] for image in request["images"]] == [0]
    assert request["audio"].endswith(".wav")
    page.get_by_role("button", name="Remove first.png").click()
    expect(files.get_by_role("listitem")).to_have_count(1)


def test_choices_are_the_servers(new_page: NewPage, server: str, client: TestClient):
    choices = client.get("/v1/models/tiny/choices").json()
    page = new_page(server)
    shown = page.get_by_role("group", name="Quality").get_by_role("radio")
    expect(shown).to_have_count(len(choices["presets"]))
    expect(page.get_by_label("Camera").locator("option")).to_have_text(["as it comes", "dolly in"])
    expect(page.locator("#reference-hint")).to_contain_text("IC-LoRA")
    page.get_by_label("Camera").select_option("dolly-in")
    page.get_by_role("radio", name="draft").check()
    page.get_by_label("Describe the clip").fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    wait_for_clip(page)
    request = client.get(f"/v1/videos/{urlsplit(page.url).fragment}/recipe").json()["request"]
    assert "dolly-in" in request["loras"][0]["path"]
    assert request["num_inference_steps"] == choices["presets"][0]["frame"]["num_inference_steps"]


def test_a_server_with_keys_asks_for_one(new_page: NewPage, server: str, client: TestClient):
    context = client.app.state.context  # pyright: ignore
    _, key = security.create_key(context.store.database, "n")
    context.gatekeeper._read_at = 0.0  # noticed at once
    page = new_page(server)
    page.get_by_label("API key").fill("aiprod_no_no")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#key-error")).to_contain_text("does not know")
    assert serious(page) == []
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#server")).to_have_text("ready")
    generate(page)
    page.reload()  # it stays as long as the tab
    wait_for_clip(page)
    assert key not in page.content()
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_label("API key")).to_be_visible()


def serious(page: Page) -> list[tuple[str, list[str]]]:
    """What axe-core finds that keeps people out: the rule and where."""
    found = axe.Axe().run(page).response["violations"]
    return [
        (violation["id"], [str(node["target"]) for node in violation["nodes"]])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def overflow(page: Page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_no_state_of_the_page_keeps_people_out_or_scrolls_sideways(
    new_page: NewPage, server: str, viewport: dict[str, int], scheme: str
):
    page = new_page(server, viewport, color_scheme=scheme, reduced_motion="reduce")
    expect(page.locator("#empty")).to_be_visible()
    assert serious(page) == [] and overflow(page) == 0
    generate(page)
    page.get_by_text("More settings").click()
    page.get_by_text("Recipe", exact=True).click()
    page.get_by_role("button", name="choose one here").click()
    assert serious(page) == [] and overflow(page) == 0
    page.get_by_role("button", name="Re-roll").click()
    expect(page.locator(".card-item")).to_have_count(2)
    wait_for_clip(page)
    page.get_by_role("link", name="Compare").click()
    expect(page.locator(".side video")).to_have_count(2)
    assert serious(page) == [] and overflow(page) == 0
    page.get_by_label("Length").press("End")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#making-progress")).to_be_visible()
    assert serious(page) == [] and overflow(page) == 0
