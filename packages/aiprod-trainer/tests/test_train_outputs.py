"""What a training shows and gives away: validation clips, trackers, the hub, the command."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_core.loader.lora import open_lora
from aiprod_pipelines import media
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline
from aiprod_trainer.cli import app
from aiprod_trainer.publishing import push_to_hub
from aiprod_trainer.train import open_model, train
from aiprod_trainer.training_config import read_training_config

VALIDATION = {"prompts": ["a red ball"], "interval": 1, "inference_steps": 2}


def test_validation_is_what_the_pipeline_makes_of_the_weights_in_training(
    configure, tiny_model, tmp_path
):
    config = configure(
        validation={**VALIDATION, "seed": 3, "video_dims": [48, 32, 9]},
        optimization={"steps": 1},
        tensorboard={"enabled": True},
    )
    last = train(config)
    folder = config.output_dir / "validation"
    pipeline = TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")
    request = {"seed": 3, "num_inference_steps": 2, "width": 48, "height": 32, "num_frames": 9}
    for step, loras in ((0, []), (1, [last / "lora.safetensors"])):
        want = tmp_path / "want.mp4"
        pipeline("a red ball", loras=loras, **request).save(want)
        files = (folder / f"step-{step:06d}-0.mp4", want)
        frames = [np.stack(list(media.read_frames(file))) for file in files]
        # Fused weights are rounded once more than the sum of two products.
        assert np.abs(frames[0].astype(int) - frames[1]).max() <= 8
    assert Image.open(folder / "step-000001-0.png").width > 100
    assert list(config.output_dir.rglob("events.out.tfevents*"))


def test_an_ic_lora_is_validated_with_its_reference_and_says_how_small_it_is(
    configure, make_part, tmp_path
):
    make_part(
        tmp_path / "data/part-00000.safetensors",
        video=torch.randn(6, 8, 3, 4, 4),
        reference_latents=torch.randn(6, 8, 3, 2, 2),
    )
    clip = tmp_path / "reference.mp4"
    media.write_video(clip, [np.zeros((9, 32, 32, 3), np.uint8)], 12)
    config = configure(
        training_strategy={"name": "video_to_video"},
        data={"preprocessed_data_root": str(tmp_path / "data")},
        validation={
            "samples": [{"prompt": "a ball", "reference": str(clip), "control": "canny"}],
            "interval": 1,
            "inference_steps": 1,
            "video_dims": [32, 32, 9],
        },
        optimization={"steps": 1},
    )
    last = train(config)
    assert (config.output_dir / "validation/step-000001-0.mp4").is_file()
    assert open_lora(last / "lora.safetensors").reference_downscale_factor == 2


def test_a_reference_that_is_always_shown_must_be_in_the_samples_too(configure):
    config = configure(training_strategy={"name": "video_to_video"}, validation=VALIDATION)
    with pytest.raises(InputError, match="needs a reference"):
        train(config)


class Hub:
    """Stands in for huggingface_hub.HfApi and remembers what it is asked."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, repo_id, exist_ok):
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self, **arguments):
        self.uploads.append(arguments)


def test_the_hub_gets_weights_configuration_and_a_card_but_no_training_state(configure):
    config = configure(
        hub={"hub_model_id": "someone/magenta"}, optimization={"steps": 1}, lora={"rank": 3}
    )
    last = train(config)
    hub = Hub()
    assert (
        push_to_hub(config, last, open_model(config), hub) == "https://hub.invalid/someone/magenta"
    )
    (upload,) = hub.uploads
    assert upload["folder_path"] == str(last)
    assert upload["ignore_patterns"] == ["state.safetensors"]
    card = (last / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == config.model.model_path
    assert "LoRA of rank 3" in card and "--lora lora.safetensors" in card


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_plans_trains_and_goes_on(configure, tmp_path):
    config = configure(optimization={"steps": 1})
    path = tmp_path / "run.yaml"
    plan = run(path, "--plan")
    assert plan.exit_code == 0 and "activations" in plan.output
    assert not config.output_dir.exists()
    assert run(path).exit_code == 0
    assert run(path, "--set", "optimization.steps=2").exit_code == 0
    assert (config.output_dir / "checkpoints/step-000002/lora.safetensors").is_file()
    assert run(path, "--no-resume").exit_code == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimization.lerning_rate=1", "did you mean optimization.learning_rate?"),
        ("optimization.optimizer_type=adam", "did you mean adamw?"),
        ("training_strategy.name=image_to_vido", "did you mean image-to-video?"),
        ("lora.target_modules=[to_w]", "no layer ends in to_w"),
        ("acceleration.memory_gb=0.5", "take a larger card"),
        ("data.preprocessed_data_root=nowhere", "make them with `aiprod dataset"),
        ("acceleration.blocks_to_swap=1", "needs optimization.enable_gradient_checkpointing"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(configure, tmp_path, setting, message):
    config = configure()
    plan = ["--plan"] if "memory_gb" in setting else []
    result = run(tmp_path / "run.yaml", "--set", setting, *plan)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not config.output_dir.exists()


@pytest.mark.parametrize("name", ["lora", "lora_camera", "ic_lora"])
def test_nanos_configurations_can_be_read(name):
    read_training_config(Path(__file__).parents[3] / f"configs/nano/{name}.yaml")


def test_the_command_imports_no_torch_before_it_runs():
    code = "import sys, aiprod_trainer.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
