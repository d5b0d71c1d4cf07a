"""Enhanced prompts: what is asked, what comes back, and that a failure costs nothing but time."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_pipelines.cli import app
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.prompt_enhancer import (
    by_language_model,
    by_rules,
    by_server,
    choose_writer,
    clean,
    enhance,
    enhance_request,
)
from aiprod_pipelines.recipe import read_recipe
from aiprod_pipelines.request import GenerationRequest

WALL, THUD = "in front of a grey wall", "a dull thud at each impact"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red ball", f"A red ball bounces up and down {WALL}, with {THUD}."),
        ("a metal ring rolls left", f"A metal ring rolls left {WALL}, with a low rumble."),
        (
            "a glass star falls on the beach",
            "A glass star falls on the beach, with a bright glassy clink.",
        ),
        ("a stick man", f"A stick man walks from left to right {WALL}, with footsteps."),
        (
            "something blue",
            f"Something blue, a rubber ball that bounces up and down {WALL}, with {THUD}.",
        ),
    ],
)
def test_rules_say_what_the_prompt_leaves_open(prompt: str, expected: str):
    assert by_rules(prompt) == expected


def test_rules_keep_a_prompt_that_says_everything():
    whole = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."
    assert by_rules(whole) == whole
    assert by_rules(by_rules("a cube")) == by_rules("a cube")


def test_answers_are_cleaned_to_one_plain_paragraph():
    written = "** \u201cA ball\u201d \u2014 it\u2019s red.\n\n  It bounces. "
    assert clean(written) == '"A ball", it\'s red. It bounces.'
    assert clean("- A ball\u2013red") == "A ball, red"


def test_a_writer_that_fails_lags_or_says_nothing_leaves_the_prompt_with_a_warning():
    def fails(prompt: str) -> str:
        raise RuntimeError("no more memory\nand a trace")

    assert enhance("a ball", fails, "it").warning == (
        "the prompt stays as it is: it failed, no more memory"
    )
    started = time.monotonic()
    late = enhance("a ball", lambda prompt: time.sleep(30) or "", "it", timeout_s=0.2)
    assert time.monotonic() - started < 5
    assert late.prompt == "a ball" and "took longer than 0.2 s" in str(late.warning)
    assert "wrote nothing" in str(enhance("a ball", lambda prompt: " -- ", "it").warning)


@pytest.fixture
def server():
    """A server that speaks OpenAI's protocol and remembers what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            asked.append((self.path, dict(self.headers), json.loads(self.rfile.read(length))))
            body = json.dumps(answers[-1]).encode()
            self.send_response(200 if answers[-1] is not None else 503)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    asked, answers = [], [{"choices": [{"message": {"content": "A red ball, lit from above."}}]}]
    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", asked, answers
    httpd.shutdown()
    httpd.server_close()


def test_a_server_is_asked_by_openais_protocol(server, monkeypatch):
    url, asked, answers = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("AIPROD_ENHANCER_MODEL", "small")
    assert by_server("a red ball", url) == "A red ball, lit from above."
    path, headers, body = asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "small" and "a red ball" in body["messages"][-1]["content"]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    answers.append({"error": "busy"})
    writer, name = choose_writer(url, "gemma3", None)
    assert "not OpenAI's chat format" in str(enhance("a ball", writer, name).warning)
    answers.append(None)
    assert "answered 503" in str(enhance("a ball", writer, name).warning)
    writer, name = choose_writer("http://127.0.0.1:9/v1", "gemma3", None)
    assert "cannot be reached" in str(enhance("a ball", writer, name).warning)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 of two layers with a chat template, in transformers' own format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gemma")
    spoken = ["a", "red", "ball", "bounces", "on", "the", "floor"]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *spoken]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>",
    )  # fmt: skip
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, sliding_window=16,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_language_model_writes_the_same_for_a_seed_and_leaves_the_random_state(
    language_model: Path,
):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = by_language_model("a red ball", language_model, seed=1, max_new_tokens=12)
    again = by_language_model("a red ball", language_model, seed=1, max_new_tokens=12)
    other = by_language_model("a red ball", language_model, seed=2, max_new_tokens=12)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == again != other
    assert 1 <= len(first.split()) <= 12


def test_the_model_decides_who_writes(language_model: Path):
    assert choose_writer("auto", "minilm", "/encoder") == (by_rules, "rules")
    assert choose_writer("auto", "gemma3", "/encoder")[1] == "/encoder"
    assert choose_writer("auto", "gemma3", None)[1] == "google/gemma-3-12b-it"
    assert choose_writer(str(language_model), "minilm", None)[1] == str(language_model)
    with pytest.raises(InputError, match="got nobody"):
        choose_writer("nobody", "minilm", None)


def test_an_enhanced_request_keeps_the_original_and_says_so(tiny_model: Path):
    class Notes(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    models = ModelSet.open(str(tiny_model), device="cpu")
    request = enhance_request(models, GenerationRequest("a red ball"), "auto", Notes())
    assert request.original_prompt == "a red ball"
    assert request.enhanced_by == "rules"
    assert request.prompt == by_rules("a red ball")
    assert notes == [f"enhanced prompt: {request.prompt}"]
    failed = enhance_request(models, GenerationRequest("a ball"), "http://127.0.0.1:9", Notes())
    assert failed == GenerationRequest("a ball")
    assert notes[-1].startswith("warning: the prompt stays as it is")


def test_naming_an_enhancer_is_asking_for_it(tiny_model: Path, tmp_path: Path):
    output = tmp_path / "clip.mp4"
    arguments = ["generate", "a red ball", "--enhancer", "rules", "-m", str(tiny_model)]
    done = CliRunner().invoke(app, [*arguments, "-o", str(output), "--json"])
    assert done.exit_code == 0
    assert read_recipe(output)["request"]["original_prompt"] == "a red ball"
