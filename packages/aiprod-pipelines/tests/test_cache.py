"""What is kept between runs: found again, bounded, whole or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_pipelines.cache import Cache, open_cache, parse_size
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

PROMPT = "a red ball bounces"


def identity(text: str) -> dict[str, str]:
    return {"kind": "prompts", "text": text}


def test_an_entry_comes_back_bit_for_bit_and_another_identity_finds_nothing(tmp_path: Path):
    cache = Cache(tmp_path)
    tensors = {"video": torch.randn(2, 3), "audio": torch.randn(4).bfloat16()}
    cache.put(identity("a"), tensors)
    found = cache.get(identity("a"))
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert cache.get(identity("b")) is None


def test_what_was_used_longest_ago_goes_first_when_the_folder_is_full(tmp_path: Path):
    cache = Cache(tmp_path, max_bytes=3 * 1200)
    for age, name in enumerate("abc"):
        cache.put(identity(name), {"x": torch.zeros(250)})
        (path,) = set(cache.entries()) - set(cache.entries()[:-1])
        os.utime(path, (1000 + age, 1000 + age))
    assert cache.get(identity("a")) is not None  # used: no longer the oldest
    cache.put(identity("d"), {"x": torch.zeros(250)})
    assert cache.get(identity("b")) is None
    assert all(cache.get(identity(name)) is not None for name in "acd")
    assert cache.info()["bytes"] <= cache.max_bytes


def test_half_an_entry_is_no_entry(tmp_path: Path):
    cache = Cache(tmp_path)
    cache.put(identity("a"), {"x": torch.zeros(100)})
    (path,) = cache.entries()
    path.write_bytes(path.read_bytes()[:200])
    assert cache.get(identity("a")) is None
    assert not path.exists()


def test_an_unwritable_folder_stops_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    cache.put(identity("a"), {"x": torch.zeros(1)})
    assert cache.get(identity("a")) is None


def test_clearing_counts_what_it_removes(tmp_path: Path):
    cache = Cache(tmp_path)
    for name in "ab":
        cache.put(identity(name), {"x": torch.zeros(1)})
    assert cache.info()["kinds"]["prompts"]["entries"] == 2
    assert cache.clear() == 2
    assert cache.info()["kinds"] == {}


def test_no_prompt_can_be_read_in_the_folder(tmp_path: Path):
    cache = Cache(tmp_path)
    cache.put(identity("a secret prompt"), {"x": torch.zeros(1)})
    (path,) = cache.entries()
    assert b"secret" not in path.read_bytes()
    assert "secret" not in str(path)


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 << 30), ("1.5 mib", 3 << 19), ("7", 7)])
def test_sizes_are_read_with_their_unit(text: str, size: int):
    assert parse_size(text) == size


def test_a_size_without_meaning_is_refused():
    with pytest.raises(InputError, match="12GiB"):
        parse_size("much")


def test_the_environment_turns_the_cache_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIPROD_CACHE_DIR", "off")
    assert open_cache() is None


def test_a_known_prompt_needs_no_text_encoder_and_gives_the_same_clip(
    tiny_model: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
):
    def run() -> str:
        pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model))
        clip = pipeline(PROMPT, num_inference_steps=2, images=[picture])
        return clip.recipe["latents_sha256"]

    def refuse(*args: object) -> None:
        raise AssertionError("a network was loaded for what is known")

    cold = run()
    for name in ("text_encoder", "text_projector", "video_encoder"):
        monkeypatch.setattr(ModelSet, name, refuse)
    assert run() == cold


def test_a_context_does_not_depend_on_which_other_prompt_was_known(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def run() -> str:
        pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model))
        return pipeline(PROMPT, negative_prompt="loud rain").recipe["latents_sha256"]

    TI2VidOneStagePipeline.from_model(str(tiny_model))("a blue ball", negative_prompt="loud rain")
    half_known = run()
    monkeypatch.setenv("AIPROD_CACHE_DIR", "off")
    assert run() == half_known


def test_a_network_given_from_outside_is_asked_every_time(tiny_model: Path):
    models = ModelSet.open(tiny_model)
    models.keep(identity("a"), {"x": torch.zeros(1)}, "text_encoder")
    assert models.recall(identity("a"), "text_encoder") is not None
    with models.text_encoder() as encoder:
        models.use("text_encoder", encoder)
    assert models.recall(identity("a"), "text_encoder") is None


def test_another_precision_is_another_entry(tiny_model: Path):
    models = ModelSet.open(tiny_model)
    models.keep(identity("a"), {"x": torch.zeros(1)}, "text_encoder")
    assert ModelSet.open(tiny_model, dtype="bfloat16").recall(identity("a"), "text_encoder") is None


def test_the_command_tells_and_clears(capsys: pytest.CaptureFixture[str]):
    from typer.testing import CliRunner

    from aiprod_pipelines.commands import app

    cache = open_cache()
    assert cache is not None
    cache.put(identity("a"), {"x": torch.zeros(1)})
    told = CliRunner().invoke(app, ["cache", "info", "--json"])
    assert json.loads(told.output)["kinds"]["prompts"]["entries"] == 1
    cleared = CliRunner().invoke(app, ["cache", "clear"])
    assert cleared.exit_code == 0
    assert cache.entries() == []
