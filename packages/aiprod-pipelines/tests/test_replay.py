"""A clip is made again from its own file, or it is said which input has changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_pipelines import flags, media, recipe
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.cli import app
from aiprod_pipelines.replay import open_replay


def aiprod(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of its own, an image, and a clip made with both."""
    folder = tmp_path_factory.mktemp("replay")
    shutil.copytree(tiny_model.parent, folder / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    result = aiprod(
        "generate", "a red ball", "-m", folder / "model" / tiny_model.name, "--seed", 5,
        "--image", folder / "first.png", "--device", "cpu", "-o", folder / "clip.mp4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same in a folder whose files may be spoilt; the clip's recipe still names the first."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_check_confirms_the_latents_and_writes_nothing(folder: Path):
    before = sorted(folder.rglob("*"))
    result = aiprod("replay", folder / "clip.mp4", "--check", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["same"] and report["changed"] == [] and report["noted"] == []
    assert report["latents_sha256"] == report["expected_sha256"]
    assert sorted(folder.rglob("*")) == before


def test_replay_writes_the_same_frames_with_the_same_recipe(folder: Path, tmp_path: Path):
    result = aiprod("replay", folder / "clip.mp4", "-o", tmp_path / "again.mp4")
    assert result.exit_code == 0, result.output
    assert "the same latents, bit for bit" in result.stdout
    assert recipe.read_recipe(tmp_path / "again.mp4") == recipe.read_recipe(folder / "clip.mp4")
    first, again = (
        np.stack(list(media.read_frames(path)))
        for path in (folder / "clip.mp4", tmp_path / "again.mp4")
    )
    assert np.array_equal(first, again)


def test_a_changed_model_is_named_and_not_run(copy: Path, tiny_model: Path):
    model = copy / "model" / tiny_model.name
    tensors = load_file(model)
    name = "model.diffusion_model.proj_out.bias"
    tensors[name] = tensors[name] + 1e-3
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in open_checkpoint(model).metadata.items()
    }
    save_file(tensors, model, metadata)
    result = aiprod("replay", copy / "clip.mp4", "--check", "--model", model)
    assert result.exit_code == 1
    assert "not the same latents" in result.stdout
    assert f"model file {model.name} has other contents" in result.stdout
    assert "denoise" not in result.stderr


@pytest.fixture
def split_model(tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
    """The tiny model as three files, in the split layout's way."""
    folder = tmp_path / "split"
    folder.mkdir()
    shutil.copytree(tiny_model.parent / "text_encoder", folder / "text_encoder")
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in open_checkpoint(tiny_model).metadata.items()
    }
    tensors = load_file(tiny_model)
    prefixes = {"video_vae": ("vae.",), "audio_vae": ("audio_vae.", "vocoder.")}
    parts = {
        name: {key: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        for name, prefix in prefixes.items()
    }
    paths = {}
    for name, part in {"transformer": tensors, **parts}.items():
        paths[name] = folder / f"tiny_{name}.safetensors"
        save_file(part, paths[name], metadata)
    return paths


@pytest.mark.parametrize("is_named_by_folder", [True, False])
def test_a_split_model_is_replayed_and_each_of_its_files_watched(
    is_named_by_folder: bool, split_model: dict[str, Path], tmp_path: Path
):
    transformer, video, audio = split_model.values()
    clip = tmp_path / "clip.mp4"
    if is_named_by_folder:
        made = aiprod("generate", "a red ball", "-m", video.parent, "--device", "cpu", "-o", clip)
        assert made.exit_code == 0, made.output
    else:
        arguments = ["--transformer-path", transformer, "--video-vae-path", video]
        arguments += ["--audio-vae-path", audio, "--prompt", "a red ball", "--device", "cpu"]
        with pytest.raises(SystemExit) as stop:
            flags.main(
                find_pipeline("one-stage"),
                [str(argument) for argument in (*arguments, "--output-path", clip)],
            )
        assert stop.value.code == 0
    stored = recipe.read_recipe(clip)["model"]
    assert {file["file"] for file in stored["files"]} == {p.name for p in split_model.values()}
    result = aiprod("replay", clip, "--check")
    assert result.exit_code == 0, result.output
    for path in split_model.values():
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        result = aiprod("replay", clip, "--check")
        assert result.exit_code == 1, result.output
        assert f"model file {path.name} has other contents" in result.stdout
        path.write_bytes(before)


def test_a_moved_image_is_found_beside_the_clip_and_a_changed_one_is_named(
    copy: Path, folder: Path, monkeypatch
):
    stored = recipe.read_recipe(copy / "clip.mp4")
    name = str(folder / "first.png")
    assert list(stored["inputs"]) == [name]
    elsewhere = {**stored, "inputs": {"gone/first.png": stored["inputs"][name]}}
    elsewhere["request"] = json.loads(
        json.dumps(stored["request"]).replace(json.dumps(name), '"gone/first.png"')
    )
    monkeypatch.setattr(recipe, "read_recipe", lambda path: elsewhere)
    found = open_replay(copy / "clip.mp4")
    assert found.request.images[0].path == copy / "first.png"
    assert found.changed == []
    Image.new("RGB", (48, 32)).save(copy / "first.png")
    assert open_replay(copy / "clip.mp4").changed == ["gone/first.png has other contents"]
    (copy / "first.png").unlink()
    with pytest.raises(InputError, match=r"gone/first\.png.*not there any more"):
        open_replay(copy / "clip.mp4")


def test_another_text_encoder_is_named(copy: Path):
    weights = copy / "model" / "text_encoder" / "model.safetensors"
    tensors = {key: tensor * 1.01 for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    changed = open_replay(copy / "clip.mp4", text_encoder=str(weights.parent)).changed
    assert changed == ["text encoder file model.safetensors has other contents"]


def test_inspect_shows_everything_the_recipe_holds(folder: Path):
    stored = json.loads(aiprod("inspect", folder / "clip.mp4", "--json").stdout)
    assert stored["computed_on"].keys() == {"device", "hardware", "dtype", "threads"}
    assert stored["versions"].keys() >= {"python", "torch", "aiprod-core"}
    shown = aiprod("inspect", folder / "clip.mp4").stdout
    for digest in (
        stored["latents_sha256"],
        stored["model"]["files"][0]["sha256"],
        *stored["inputs"].values(),
    ):
        assert digest in shown


def test_a_recipe_of_another_format_is_refused(folder: Path, monkeypatch):
    stored = recipe.read_recipe(folder / "clip.mp4")
    monkeypatch.setattr(recipe, "read_recipe", lambda path: stored | {"aiprod": 99})
    with pytest.raises(InputError, match="format 99, this AIPROD reads 1"):
        open_replay(folder / "clip.mp4")


def test_large_files_are_known_by_samples_that_see_a_changed_tensor(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(recipe, "WHOLE_FILE_LIMIT", 2**16)
    monkeypatch.setattr(recipe, "SAMPLE_BYTES", 64)
    data = bytearray(np.random.default_rng(0).integers(0, 255, 2**18, np.uint8).tobytes())
    path = tmp_path / "large.bin"
    path.write_bytes(data)
    before = recipe.file_identity(path)
    assert before == recipe.file_identity(path) and before["bytes"] == 2**18
    data[100_000:110_000] = bytes(10_000)
    path.write_bytes(data)
    assert recipe.contents_of(recipe.file_identity(path)) != recipe.contents_of(before)


def test_stream_flag_writes_the_same_recipe_to_a_file_and_to_standard_output(
    folder: Path, tmp_path: Path, tiny_model: Path
):
    options = ["-m", folder / "model" / tiny_model.name, "--device", "cpu", "--stream", "--json"]
    result = aiprod("generate", "a blue ball", *options, "-o", tmp_path / "clip.mp4")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert 0 < report["first_segment_s"] < 60
    piped = aiprod("generate", "a blue ball", *options, "-o", "-")
    assert piped.exit_code == 0, piped.output
    (tmp_path / "piped.mp4").write_bytes(piped.stdout_bytes)
    first, second = (recipe.read_recipe(tmp_path / n) for n in ("clip.mp4", "piped.mp4"))
    assert first == second
    assert first["latents_sha256"] == report["latents_sha256"]
    assert json.loads(piped.stderr.splitlines()[-1])["output"] == "-"
