"""What is kept between runs: found again, bounded, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_core.loader.lora import open_lora
from aiprod_core.quantization.schemes import SCHEMES
from aiprod_pipelines import components
from aiprod_pipelines.cache import Cache, keep_compiled_code, open_cache, parse_size
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


def test_weights_and_code_leave_half_of_the_folder_to_prompts(tmp_path: Path):
    cache = Cache(tmp_path, max_bytes=8000)
    cache.put(identity("a"), {"x": torch.zeros(250)})
    os.utime(cache.entries()[0], (1000, 1000))
    for strength in (0.1, 0.2, 0.3):
        cache.put({"kind": "merged", "strength": strength}, {"x": torch.zeros(900)})
    assert cache.info()["kinds"]["merged"]["entries"] == 1
    assert cache.get(identity("a")) is not None


def test_what_would_be_the_first_to_go_again_is_not_written(tmp_path: Path):
    cache = Cache(tmp_path, max_bytes=8000)
    cache.put(identity("a"), {"x": torch.zeros(250)})
    cache.put({"kind": "merged"}, {"x": torch.zeros(1001)})
    cache.put(identity("b"), {"x": torch.zeros(2001)})
    assert [path.parent.name for path in cache.entries()] == ["prompts"]


def test_a_folder_of_code_is_an_entry_that_is_bounded_and_cleared(tmp_path: Path):
    cache = Cache(tmp_path, max_bytes=4000)
    folders = []
    for age, name in enumerate("abc"):
        folder = cache.code_folder({"kind": "compiled", "config": name})
        assert folder is not None
        (folder / "deep").mkdir()
        (folder / "deep" / "code.so").write_bytes(bytes(900))
        os.utime(folder, (1000 + age, 1000 + age))
        folders.append(folder)
    assert cache.info()["kinds"]["compiled"] == {"entries": 3, "bytes": 2700}
    again = cache.code_folder({"kind": "compiled", "config": "a"})
    assert again == folders[0] and (again / "deep" / "code.so").exists()  # used: the newest
    assert not folders[1].exists() and folders[2].exists()
    assert cache.clear() == 2
    assert not folders[0].exists()


def test_what_a_killed_process_was_writing_does_not_stay(tmp_path: Path):
    cache = Cache(tmp_path)
    for name, age in (("killed", 7200), ("at work", 60)):
        (tmp_path / f".new-{name}").mkdir()
        (tmp_path / f".new-{name}" / "half.safetensors").write_bytes(bytes(100))
        then = time.time() - age
        os.utime(tmp_path / f".new-{name}", (then, then))
    cache.put(identity("a"), {"x": torch.zeros(1)})
    assert [path.name for path in tmp_path.glob(".new-*")] == [".new-at work"]
    assert cache.info()["kinds"].keys() == {"prompts"}


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


@pytest.fixture
def remembers_small_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "MIN_MERGED_WEIGHTS", 1)


def refuse_to_fuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("adapters were added up that are known")


@pytest.mark.parametrize("quantization", [None, *SCHEMES])
@pytest.mark.parametrize("keeps_loaded", [True, False])
@pytest.mark.usefixtures("remembers_small_merges")
def test_merged_adapters_come_back_bit_for_bit_and_the_base_after_them(
    tiny_family: Path,
    quantization: str | None,
    keeps_loaded: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    model = tiny_family / "tiny-dev.safetensors"
    lora = open_lora(tiny_family / "tiny-distilled-lora-2.safetensors")

    def weights(loras: list, models: ModelSet) -> dict[str, torch.Tensor]:
        with models.transformer(loras) as network:
            return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def opened() -> ModelSet:
        return replace(ModelSet.open(model, quantization=quantization), keeps_loaded=keeps_loaded)

    def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            same = torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, other[name])))
            assert same, name

    base = weights([], opened())
    plain = weights([(lora, 0.7)], replace(opened(), cache=None))
    changed = "transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(plain[changed].float(), base[changed].float())
    assert_equal(weights([(lora, 0.7)], opened()), plain)
    monkeypatch.setattr(components, "fuse", refuse_to_fuse)
    known = opened()
    assert_equal(weights([(lora, 0.7)], known), plain)
    with pytest.raises(AssertionError, match="that are known"):
        weights([(lora, 0.6)], known)
    monkeypatch.undo()
    assert_equal(weights([], known), base)


@pytest.mark.usefixtures("remembers_small_merges")
def test_a_clip_is_the_same_with_remembered_adapters(
    tiny_family: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = tiny_family / "tiny-lora-camera-control-jib-up.safetensors"

    def run() -> str:
        pipeline = TI2VidOneStagePipeline.from_model(tiny_family / "tiny-dev.safetensors")
        clip = pipeline(PROMPT, num_inference_steps=2, loras=[[str(adapter), 0.5]])
        return clip.recipe["latents_sha256"]

    cold = run()
    with monkeypatch.context() as changes:
        changes.setattr(components, "fuse", refuse_to_fuse)
        assert run() == cold
    monkeypatch.setenv("AIPROD_CACHE_DIR", "off")
    assert run() == cold


def test_small_adapters_are_added_up_each_time(tiny_family: Path):
    models = ModelSet.open(tiny_family / "tiny-dev.safetensors")
    lora = open_lora(tiny_family / "tiny-distilled-lora-2.safetensors")
    with models.transformer([(lora, 1.0)]):
        pass
    assert models.cache is not None
    assert models.cache.entries() == []


COMPILING = """
import torch
from torch._dynamo.utils import counters
from aiprod_pipelines.cache import keep_compiled_code

folder = keep_compiled_code("a network")
value = torch.compile(lambda x: x.sin() * 2)(torch.ones(8))
assert torch.allclose(value, torch.ones(8).sin() * 2)
print(folder, counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_second_process_finds_what_the_first_has_compiled(own_cache: Path):
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}

    def compile_in_a_process() -> list[str]:
        command = [sys.executable, "-c", COMPILING]
        return subprocess.check_output(command, env=environment, text=True).split()

    folder, hits = compile_in_a_process()
    assert Path(folder).parent == own_cache / "compiled" and hits == "0"
    libraries = set(Path(folder).rglob("*.so"))
    assert libraries
    assert compile_in_a_process() == [folder, "1"]
    assert set(Path(folder).rglob("*.so")) == libraries


def test_a_folder_that_the_user_chose_for_code_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert keep_compiled_code("a network") is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


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
