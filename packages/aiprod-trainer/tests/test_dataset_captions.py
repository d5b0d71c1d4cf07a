"""Captions from a server that speaks OpenAI's protocol: a real one, on this machine."""

import base64
import io
import json
import threading
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_trainer.dataset import captions
from aiprod_trainer.dataset.captions import CaptionSettings, by_server, caption_videos
from aiprod_trainer.dataset.tables import read_table


class Server(ThreadingHTTPServer):
    """Answers with a caption that says what it was sent. `refusals` are statuses to answer first;
    a clip whose first frame is red is refused always."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.refusals: list[int] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.refusals:
            self.send_response(self.server.refusals.pop(0))
            self.send_header("Retry-After", "0.01")
            self.end_headers()
            return
        self.server.bodies.append(body)
        content = body["messages"][0]["content"]
        images = [item["image_url"]["url"] for item in content if item["type"] == "image_url"]
        first = Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2])))
        red, _, blue = np.asarray(first).mean((0, 1))
        if red > 200 and blue < 50:
            self.send_error(400)
            return
        sounds = [item["input_audio"] for item in content if item["type"] == "input_audio"]
        text = f"The video shows {len(images)} frames of blue {blue:.0f}"
        if sounds:
            with wave.open(io.BytesIO(base64.b64decode(sounds[0]["data"]))) as sound:
                text += f" and {sound.getnframes() / sound.getframerate():.1f} s of sound"
        answer = {"choices": [{"message": {"content": f"<think>hm</think>\n {text}.\n"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(captions, "WAIT_S", 0.01)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good clips, one of them with sound, one that the server refuses, and a broken one."""
    folder = tmp_path_factory.mktemp("clips")
    sound = media.Audio(np.full((1, 16000), 0.1, np.float32), 16000)
    for name, colour, audio in (
        ("a", (0, 0, 100), sound),
        ("b", (0, 0, 200), None),
        ("refused", (255, 0, 0), None),
    ):
        frames = np.full((12, 32, 48, 3), colour, np.uint8)
        media.write_video(folder / f"{name}.mp4", [frames], 12, audio=audio)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def test_the_model_sees_frames_and_hears_the_sound(folder, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    output = tmp_path / "captions.jsonl"
    rows, failed = caption_videos(folder, output, by_server(server.url, "omni"), CaptionSettings())
    assert [Path(row["video"]).name for row in rows] == ["a.mp4", "b.mp4"]
    assert rows[0]["caption"].startswith("2 frames of blue ")
    assert rows[0]["caption"].endswith("and 1.0 s of sound.")
    assert "sound" not in rows[1]["caption"]
    assert read_table(output) == rows
    assert (tmp_path / rows[0]["video"]).resolve() == (folder / "a.mp4").resolve()
    assert [Path(row["video"]).name for row in failed] == ["broken.mp4", "refused.mp4"]
    assert "400" in failed[1]["reason"]
    assert server.bodies[0]["model"] == "omni"
    assert set(server.keys) == {"Bearer secret"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt", ".json"])
def test_no_caption_is_asked_for_twice(folder, server, tmp_path, suffix):
    output = tmp_path / f"captions{suffix}"
    ask = by_server(server.url)
    server.refusals = [503, 429]  # a busy server is asked again
    first, _ = caption_videos(folder / "a.mp4", output, ask, CaptionSettings())
    assert len(server.bodies) == 1
    second, _ = caption_videos(folder, output, ask, CaptionSettings())
    asked = len(server.bodies)
    assert asked == 3  # b and the refused one
    assert second[0] == first[0]
    caption_videos(folder / "a.mp4", output, ask, CaptionSettings(), overwrite=True)
    assert len(server.bodies) == asked + 1


def test_captions_that_a_killed_run_got_are_kept(folder, server, tmp_path):
    """What a kill leaves is the journal, its last line perhaps cut short."""
    output = tmp_path / "captions.csv"
    ask = by_server(server.url)
    calls = []

    def dies_at_the_second(shown, settings):
        calls.append(1)
        if len(calls) == 2:
            raise SystemExit
        return ask(shown, settings)

    with pytest.raises(SystemExit):
        caption_videos(folder, output, dies_at_the_second, CaptionSettings())
    assert not output.exists()
    with (tmp_path / ".captions.csv.journal").open("a") as journal:
        journal.write('["../x", "half')
    rows, _ = caption_videos(folder, output, ask, CaptionSettings())
    whole, _ = caption_videos(folder, tmp_path / "whole.csv", ask, CaptionSettings())
    assert rows == whole
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob(".captions*"))


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_everything_stops_the_run(folder, server, tmp_path, status):
    server.refusals = [status] * 9
    with pytest.raises(InputError, match=f"{status}.*check the URL"):
        caption_videos(folder, tmp_path / "c.csv", by_server(server.url), CaptionSettings())


def test_a_server_that_is_not_there_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "WAIT_S", 0.01)
    ask = by_server("http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match=r"127.0.0.1:9.*cannot be reached"):
        caption_videos(folder, tmp_path / "c.csv", ask, CaptionSettings())


def save_tiny_gemma(folder: Path) -> None:
    """A random Gemma 3 of one block that sees images of 28 pixels and knows a hundred words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    marks = ["<pad>", "<eos>", "<bos>", "<boi>", "<eoi>", "<img>", "<unk>"]
    words = {word: i for i, word in enumerate([*marks, *(f"word{i}" for i in range(100))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
    template = (
        "{% for message in messages %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<boi>{% else %}{{ item['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 16
    config = Gemma3Config(
        text_config={
            **sizes,
            "vocab_size": len(words),
            "num_key_value_heads": 1,
            "head_dim": 8,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=3,
        eoi_token_index=4,
        image_token_index=5,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)


def test_a_model_of_transformers_captions_what_it_is_shown(folder, tmp_path):
    save_tiny_gemma(tmp_path / "gemma")
    ask = captions.by_transformers(str(tmp_path / "gemma"), "cpu")
    settings = CaptionSettings(max_tokens=6)
    answers = [ask(captions.show(folder / f"{name}.mp4", settings), settings) for name in "aab"]
    assert answers[0] == answers[1]
    assert 1 <= len(answers[0].split()) <= 6
    assert set(answers[0].split()) <= {f"word{i}" for i in range(100)}


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no captioning model can be loaded"):
        captions.by_transformers(str(tmp_path), "cpu")
