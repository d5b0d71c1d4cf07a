"""The `aiprod` command as a shell sees it: exit codes, messages, JSON, and no half-written file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from aiprod_pipelines import media
from aiprod_pipelines.cli import app

KEYS = {
    "output", "model", "pipeline", "seed", "width", "height", "num_frames", "frame_rate",
    "audio_sample_rate", "seconds", "peak_memory_mib",
}  # fmt: skip


def aiprod(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_writes_a_playable_clip_and_one_json_line(tiny_model: Path, tmp_path: Path):
    output = tmp_path / "clip.mp4"
    result = aiprod(
        "generate", "a red ball", "-o", output, "-m", tiny_model, "--seed", 7, "--enlarge", 2,
        "--cfg-scale", "video=2,audio=4", "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report.keys() >= KEYS
    assert (report["seed"], report["pipeline"], report["output"]) == (7, "one-stage", str(output))
    info = media.probe(output)
    assert (report["width"], report["height"]) == (info.width, info.height) == (96, 64)
    assert (report["num_frames"], report["frame_rate"]) == (info.num_frames, info.fps)
    assert report["audio_sample_rate"] == info.audio_sample_rate == 16000
    assert report["seconds"].keys() >= {"encode prompt", "denoise", "decode video", "decode audio"}
    assert report["peak_memory_mib"] > 10

    recipe = json.loads(aiprod("inspect", output, "--json").stdout)
    assert recipe["latents_sha256"] == report["latents_sha256"]
    assert recipe["request"]["enlarge"] == 2
    assert recipe["request"]["cfg_scale"] == {"video": 2.0, "audio": 4.0}
    shown = aiprod("inspect", output).stdout
    assert "a red ball" in shown and "tiny-dev.safetensors" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-frames", 12], "4k+1; got 12, try 13"),
        (["--width", 45], "width must be a multiple of 8; got 45, try 48"),
        (["--image", "absent.png"], "absent.png: no such file"),
        (["--cfg-scale", "high"], '--cfg-scale is one number or video=NUMBER'),
        (["--seed", -1], "seed must be from 0"),
        (["--device", "gpu"], "device must be cpu, cuda"),
        (["--dtype", "int8"], "dtype must be one of float32"),
        (["-m", "absent.safetensors"], "absent.safetensors: no such model"),
        (["-o", "."], "is a directory"),
        (["-o", "absent/clip.mp4"], "the folder absent does not exist"),
        (["-o", "clip.avi"], "try clip.mp4"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(
    arguments, message, tiny_model: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = aiprod("generate", "a red ball", "-m", tiny_model, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut", "cut short"),
        ("pickle", "this is a pickle"),
        ("garbage", "not a safetensors file"),
        ("lora", "It holds LoRA matrices"),
        ("no-metadata", 'no "config" in the header'),
        ("missing-key", "tensors are missing: transformer_blocks.0.attn1.to_q.weight"),
        ("diffusion-decoder", "diffusion decoder of LTX-2.5"),
        ("gemma4", 'gemma_version "4" is not supported'),
        ("other-encoder", 'text_encoder type "t5" is not supported'),
    ],
)
def test_a_model_that_cannot_work_is_refused_by_name(
    name: str, message: str, tiny_model: Path, tmp_path: Path
):
    path = tmp_path / f"{name}.safetensors"
    write_unusable_model(name, tiny_model, path)
    result = aiprod(
        "generate", "a ball", "-m", path, "-o", tmp_path / "clip.mp4", "--device", "cpu",
        "--text-encoder", tiny_model.parent / "text_encoder",
    )  # fmt: skip
    assert result.exit_code == 2, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert message in error and name in error
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def write_unusable_model(name: str, whole: Path, path: Path) -> None:
    """Copies of the tiny model, each spoilt in one way."""
    tensors, metadata = read_whole(whole)
    config = json.loads(metadata["config"])
    if name == "cut":
        path.write_bytes(whole.read_bytes()[:-1000])
        return
    if name == "pickle":
        torch.save({"a": torch.zeros(1)}, path)
        return
    if name == "garbage":
        path.write_bytes(b"\xff" * 1000)
        return
    if name == "lora":
        tensors = {"diffusion_model.proj_out.lora_A.weight": torch.zeros(2, 2)}
        metadata = {}
    if name == "no-metadata":
        metadata = {}
    if name == "missing-key":
        del tensors["model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"]
    if name == "diffusion-decoder":
        tensors = {key: t for key, t in tensors.items() if not key.startswith("vae.decoder.")}
        metadata |= {"model_version": "2.5.0"}
    if name == "gemma4":
        del config["text_encoder"]
        metadata |= {"gemma_source_checkpoint": json.dumps({"gemma_version": "4"})}
        metadata |= {"config": json.dumps(config)}
    if name == "other-encoder":
        metadata |= {"config": json.dumps(config | {"text_encoder": {"type": "t5"}})}
    save_file(tensors, path, metadata=metadata)


def test_gemma_that_is_not_given_is_missed_before_weights_are_read(
    tiny_model: Path, tmp_path: Path
):
    path = tmp_path / "gemma.safetensors"
    tensors, metadata = read_whole(tiny_model)
    config = json.loads(metadata["config"])
    del config["text_encoder"]
    save_file(tensors, path, metadata=metadata | {"config": json.dumps(config)})
    result = aiprod("generate", "a ball", "-m", path, "-o", tmp_path / "clip.mp4")
    assert result.exit_code == 2
    assert "needs a text encoder: give --text-encoder" in result.stderr


def test_models_show_counts_parameters_from_the_header(tiny_model: Path):
    facts = json.loads(aiprod("models", "show", tiny_model, "--json").stdout)
    sizes = {key: tensor.numel() for key, tensor in read_whole(tiny_model)[0].items()}
    counted = sum(size for key, size in sizes.items() if "per_channel_statistics" not in key)
    assert sum(facts["parameters"].values()) == counted
    assert facts["version"] == "2.3.0"
    assert facts["defaults"]["num_frames"] == 9
    table = aiprod("models", "show", tiny_model).stdout
    assert f"{facts['parameters']['transformer']:,}" in table


def test_models_list_says_whether_nano_is_there():
    listed = json.loads(aiprod("models", "list", "--json").stdout)
    assert listed[0]["name"] == "nano"


def test_inspect_refuses_a_clip_without_a_recipe(tmp_path: Path):
    media.write_video(tmp_path / "other.mp4", [np.zeros((3, 32, 32, 3), np.uint8)], 12)
    result = aiprod("inspect", tmp_path / "other.mp4")
    assert result.exit_code == 2
    assert "carries no AIPROD recipe" in result.stderr


def test_help_teaches_without_importing_torch():
    code = (
        "import sys; from aiprod_pipelines.cli import app\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['generate', '--help'])\n"
        "assert 'torch' not in sys.modules and 'av' not in sys.modules\n"
        "print(result.stdout)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert "bounces on a grey floor" in result.stdout
    assert "--num-frames" in result.stdout and "8k+1" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_with_130_and_leaves_nothing(
    number: signal.Signals, tiny_model: Path, tmp_path: Path
):
    process = subprocess.Popen(
        [
            sys.executable, "-c", "from aiprod_pipelines.cli import main; main()",
            "generate", "a ball", "-m", str(tiny_model), "-o", str(tmp_path / "clip.mp4"),
            "--device", "cpu", "--steps", "10000",
        ],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # Shells start background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    process.stderr.readline()  # "encode prompt: ...": the run is under way
    time.sleep(0.3)
    process.send_signal(number)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert list(tmp_path.iterdir()) == []
