"""Finding a model by its name, and what its header tells."""

import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from aiprod_core.errors import CheckpointError, InputError
from aiprod_pipelines import model_files
from aiprod_pipelines.components import ModelSet, choose_dtype
from aiprod_pipelines.conversion import convert_variants
from aiprod_pipelines.model_files import describe_model, resolve_model
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline


@pytest.fixture
def split(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in the split layout, with an adapter and an upsampler beside it."""
    with safe_open(tiny_model, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    parts = {"audio": ("audio_vae.", "vocoder."), "transformer": ("model.",), "vae": ("vae.",)}
    parts["text"] = ("text_embedding_projection.",)
    for name, prefixes in parts.items():
        chosen = {key: t for key, t in tensors.items() if key.startswith(prefixes)}
        save_file(chosen, tmp_path / f"{name}.safetensors", metadata=metadata)
    lora = {"diffusion_model.proj_out.lora_A.weight": torch.zeros(2, 2)}
    save_file(lora, tmp_path / "a-lora.safetensors")
    save_file({"initial_conv.weight": torch.zeros(2)}, tmp_path / "upscaler.safetensors")
    shutil.copytree(tiny_model.parent / "text_encoder", tmp_path / "text_encoder")
    return tmp_path


def test_split_files_make_the_same_clip_as_the_monolith(split: Path, tiny_model: Path):
    models = ModelSet.open(split, device="cpu")
    assert [path.name for path in models.checkpoint.paths] == [
        "transformer.safetensors", "audio.safetensors", "text.safetensors", "vae.safetensors"
    ]  # fmt: skip
    whole = TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")("a ball").recipe
    assert (
        TI2VidOneStagePipeline(models)("a ball").recipe["latents_sha256"] == whole["latents_sha256"]
    )


def test_a_part_alone_is_refused_but_can_be_shown(split: Path):
    with pytest.raises(CheckpointError, match="no video decoder and no text projection in it"):
        ModelSet.open(split / "transformer.safetensors", text_encoder=split, device="cpu")
    with pytest.raises(CheckpointError, match=r"no transformer .* holds video decoder"):
        ModelSet.open(split / "vae.safetensors", device="cpu")
    assert "video decoder" in describe_model(str(split / "vae.safetensors"))["parameters"]


def test_a_folder_of_several_models_asks_which(tiny_model: Path, tmp_path: Path):
    for name in ("one", "two"):
        shutil.copy(tiny_model, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"give one of one\.safetensors, two\.safetensors"):
        resolve_model(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.safetensors file in this folder"):
        resolve_model(str(tmp_path / "empty"))


def test_one_shard_stands_for_all_and_a_missing_one_is_named(tiny_model: Path, tmp_path: Path):
    names = [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shutil.copy(tiny_model, tmp_path / names[0])
    with pytest.raises(CheckpointError, match=f"1 of 2 shards are missing: {names[1]}"):
        resolve_model(str(tmp_path / names[0]))
    shutil.copy(tiny_model, tmp_path / names[1])
    assert [path.name for path in resolve_model(str(tmp_path / names[1]))] == names


def test_the_dev_file_of_a_repository_is_taken_and_its_header_checked_before_the_download(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    fetched: list[str] = []
    files = ["x-dev.safetensors", "x-dev-fp8.safetensors", "vae/d.safetensors", "README.md"]
    header = huggingface_hub.utils.SafetensorsFileMetadata(metadata={}, tensors={})

    def fetch(repo_id: str, file_name: str) -> str:
        fetched.append(file_name)
        return str(tiny_model)

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "list_repo_files", lambda self, repo_id: files)
    monkeypatch.setattr(api, "parse_safetensors_file_metadata", lambda *_: header)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(CheckpointError, match='no "config" in the header'):
        resolve_model("org/name")
    assert fetched == []
    monkeypatch.setattr(model_files, "check_supported", lambda *_: None)
    assert resolve_model("org/name") == [tiny_model]
    assert fetched == ["x-dev.safetensors"]
    files.remove("x-dev.safetensors")
    files.append("y.safetensors")
    with pytest.raises(InputError, match=r"several files; give one, e\.g\. org/name/x-dev-fp8"):
        resolve_model("org/name")


def test_a_hub_out_of_reach_falls_back_to_the_cache(tiny_model: Path, monkeypatch):
    def unreachable(self, repo_id):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(model_files, "_cached_files", list)
    with pytest.raises(InputError, match="the hub is out of reach and its cache has no copy"):
        resolve_model("org/name")
    monkeypatch.setattr(
        model_files, "_cached_files", lambda: [("org/name", "x-dev.safetensors", tiny_model)]
    )
    assert resolve_model("org/name") == [tiny_model]


def test_precision_follows_the_device():
    assert choose_dtype(None, torch.device("cpu")) == torch.float32
    assert choose_dtype(None, torch.device("cuda")) == torch.bfloat16


def test_a_variant_of_nano_is_made_where_its_error_says_and_found_there(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(tiny_model, tmp_path / "nano-dev.safetensors")
    shutil.copytree(tiny_model.parent / "text_encoder", tmp_path / "text_encoder")
    monkeypatch.setattr(model_files.importlib.resources, "files", lambda package: tmp_path)
    command = f"aiprod models convert nano {tmp_path} --variant dev-fp8"
    with pytest.raises(InputError, match=re.escape(command)):
        resolve_model("nano-dev-fp8")
    notes = {entry["name"]: entry for entry in model_files.available_models()}
    assert notes["nano-dev-fp8"]["bytes"] is None
    assert "to be made of nano" in notes["nano-dev-fp8"]["note"]
    convert_variants("nano", tmp_path, ["dev-fp8"])
    assert resolve_model("nano-dev-fp8") == [tmp_path / "nano-dev-fp8.safetensors"]
    made = {entry["name"]: entry for entry in model_files.available_models()}["nano-dev-fp8"]
    assert made["bytes"] and made["parameters"] == notes["nano"]["parameters"]
    shipped = tmp_path / "nano-dev.safetensors"
    os.utime(shipped, (shipped.stat().st_atime, shipped.stat().st_mtime + 10))
    with pytest.raises(InputError, match="of an older nano"):
        resolve_model("nano-dev-fp8")
