"""Checkpoints made of training runs, and how latents are normalised for the transformer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_text_projector, load_transformer, load_vocoder
from aiprod_pipelines.model_files import describe_model
from aiprod_trainer import export
from aiprod_trainer.export import channel_scales
from aiprod_trainer.train_base import TextToClip


def test_channels_are_scaled_by_the_root_of_what_they_change_in_the_picture():
    decoder = nn.Conv3d(3, 3, 1, bias=False)
    with torch.no_grad():
        decoder.weight.copy_(torch.diag(torch.tensor([1.0, 4.0, 0.0]))[..., None, None, None])
    latents = torch.randn(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    latents /= latents.std(dim=(0, 2, 3, 4), keepdim=True)
    scales = channel_scales(decoder, latents).detach()
    assert scales[1] / scales[0] == pytest.approx(2.0, rel=0.01)
    assert scales[2] == pytest.approx(0.2)  # a channel that shows nowhere is not lost entirely
    assert scales[:2].square().sum().item() / 3 == pytest.approx(1.0, rel=0.01)


def test_a_model_of_the_same_weights_is_written_whole_and_names_its_world(
    tiny_model: Path, tmp_path: Path
):
    checkpoint = open_checkpoint(tiny_model)
    model = TextToClip(load_transformer(checkpoint), load_text_projector(checkpoint))
    state = {f"average/{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")
    sections = {name: checkpoint.section(name) for name in ("transformer", "text_encoder")}
    (tmp_path / "config.json").write_text(json.dumps(sections))
    (tmp_path / "generation.yaml").write_text("num_inference_steps: 3\n")
    made = tmp_path / "nano-dev.safetensors"
    command = ["model", "--codecs", str(tiny_model), "--transformer", str(tmp_path)]
    command += ["--generation", str(tmp_path / "generation.yaml"), "--dtype", "float32"]
    assert export.main([*command, "--world", "v2", "--out", str(made)]) == 0
    before, after = load_file(tiny_model), load_file(made)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name].float(), rtol=0, atol=0)
    assert after.keys() == before.keys()
    assert open_checkpoint(made).metadata["world"] == "v2"


def test_a_model_gets_the_vocoder_of_a_run_in_place_of_its_codecs(tiny_model: Path, tmp_path: Path):
    checkpoint = open_checkpoint(tiny_model)
    model = TextToClip(load_transformer(checkpoint), load_text_projector(checkpoint))
    vocoder = load_vocoder(checkpoint)
    for name, parts in (("base", model.state_dict()), ("vocoder", vocoder.state_dict())):
        (tmp_path / name).mkdir()
        state = {f"average/{key}": tensor + (name == "vocoder") for key, tensor in parts.items()}
        save_file(state, tmp_path / name / "state.safetensors")
        sections = ("vocoder",) if name == "vocoder" else ("transformer", "text_encoder")
        config = {section: checkpoint.section(section) for section in sections}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation.yaml").write_text("{}\n")
    made = tmp_path / "made.safetensors"
    command = ["model", "--codecs", str(tiny_model), "--transformer", str(tmp_path / "base")]
    command += ["--vocoder", str(tmp_path / "vocoder"), "--dtype", "float32", "--out", str(made)]
    assert export.main([*command, "--generation", str(tmp_path / "generation.yaml")]) == 0
    before, after = load_file(tiny_model), load_file(made)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        moved = 1 if name.startswith("vocoder.") else 0
        torch.testing.assert_close(tensor, before[name].float() + moved, rtol=0, atol=1e-6)


def test_a_model_may_stop_between_where_a_training_began_and_where_it_ended(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = open_checkpoint(tiny_model)
    model = TextToClip(load_transformer(checkpoint), load_text_projector(checkpoint))
    state = {f"average/{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")
    sections = {name: checkpoint.section(name) for name in ("transformer", "text_encoder")}
    (tmp_path / "generation.yaml").write_text("{}\n")
    made = tmp_path / "between.safetensors"
    command = ["model", "--codecs", str(tiny_model), "--transformer", str(tmp_path)]
    command += ["--generation", str(tmp_path / "generation.yaml"), "--dtype", "float32"]
    command += ["--out", str(made), "--share"]
    (tmp_path / "config.json").write_text(json.dumps(sections | {"start": None}))
    assert export.main([*command, "0.25"]) == 2
    (tmp_path / "config.json").write_text(json.dumps(sections | {"start": str(tiny_model)}))
    assert export.main([*command, "1.5"]) == 2
    assert "1.5 is not between 0 and 1" in capsys.readouterr().err
    assert not made.exists()
    assert export.main([*command, "0.25"]) == 0
    before, after = load_file(tiny_model), load_file(made)
    for name, tensor in after.items():
        moved = 0 if name.startswith(("vae.", "audio_vae.", "vocoder.")) else 0.25
        torch.testing.assert_close(tensor, before[name].float() + moved, rtol=0, atol=1e-6)


def test_scores_are_noted_in_the_header_and_shown_without_a_change_of_weights(
    tiny_model: Path, tmp_path: Path
):
    model = tmp_path / "nano-dev.safetensors"
    shutil.copy(tiny_model, model)
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"colour": 0.5, "num_prompts": 8, "rows": [1, 2], "camera": None}))
    assert export.main(["scores", "--model", str(model), "--scores", str(scores)]) == 0
    assert describe_model(str(model))["scores"] == {"colour": 0.5, "num_prompts": 8}
    for name, tensor in load_file(tiny_model).items():
        torch.testing.assert_close(load_file(model)[name], tensor, rtol=0, atol=0)
    assert export.main(["scores", "--model", str(model), "--scores", "nothing.json"]) == 2


def test_a_lora_exported_at_a_strength_adds_that_much_more(tmp_path: Path):
    folder = tmp_path / "run/checkpoints/step-000002"
    folder.mkdir(parents=True)
    lora = {
        "diffusion_model.a.lora_A.weight": torch.randn(2, 6),
        "diffusion_model.a.lora_B.weight": torch.randn(4, 2),
    }
    save_file(lora, folder / "lora.safetensors", metadata={"base_model": "nano-dev.safetensors"})
    out = tmp_path / "stronger.safetensors"
    command = ["lora", "--out", str(out), "--strength", "1.5", "--run"]
    assert export.main([*command, str(tmp_path / "run")]) == 0
    found, (a, b) = load_file(out), lora
    torch.testing.assert_close(found[b] @ found[a], 1.5 * (lora[b] @ lora[a]))
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"base_model": "nano-dev.safetensors"}
    assert export.main([*command, str(tmp_path / "nothing")]) == 2
