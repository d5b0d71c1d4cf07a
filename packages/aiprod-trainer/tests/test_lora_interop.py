"""LoRA files go to diffusers and PEFT and come from there, with the same output on both sides."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from diffusers import LTX2Pipeline
from peft import LoraConfig, get_peft_model_state_dict

from aiprod_core.errors import InputError
from aiprod_core.loader.lora import fuse, open_lora
from aiprod_trainer.adapters import attach, load_lora, save_lora, target_layers
from aiprod_trainer.checkpoints import trained_parameters

CORE_TESTS = Path(__file__).parents[2] / "aiprod-core/tests"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"core_{name}", CORE_TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peer():
    """core's comparison of the two networks: equal weights, equal inputs."""
    return load("test_transformer_against_diffusers")


@pytest.fixture
def inputs(peer):
    conftest = load("conftest")
    build = conftest.modalities.__wrapped__()
    return peer.one_sigma(build(conftest.TINY_2_3))


@pytest.fixture
def networks(peer):
    return peer.pair(load("conftest").TINY_2_3)


def randomise_(network: torch.nn.Module, ending: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if ending in name:
            parameter.data.normal_(std=0.3, generator=generator)


def test_a_lora_trained_here_gives_diffusers_the_same_output(peer, networks, inputs, tmp_path):
    ours, theirs = networks
    base = ours(*inputs)
    layers = target_layers(ours, TARGETS)
    attach(ours, layers, rank=4, alpha=2, generator=torch.Generator().manual_seed(0))
    randomise_(ours, "lora_B")
    path = tmp_path / "lora.safetensors"
    save_lora(path, trained_parameters(ours), scale=2 / 4, dtype=torch.float32)
    state = LTX2Pipeline.lora_state_dict(str(path))
    theirs.load_lora_adapter(state, prefix="transformer")
    got = ours(*inputs)
    assert not torch.allclose(got[0], base[0], atol=1e-2)
    peer.assert_agree(got, peer.call_theirs(theirs, *inputs))


def test_a_lora_trained_by_peft_gives_the_same_output_here(peer, networks, inputs, tmp_path):
    ours, theirs = networks
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), init_lora_weights=False)
    theirs.add_adapter(config)
    LTX2Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    want = peer.call_theirs(theirs, *inputs)
    path = tmp_path / "pytorch_lora_weights.safetensors"

    fusion = fuse(ours, [(open_lora(path), 1.0)])
    peer.assert_agree(ours(*inputs), want)
    fusion.unfuse()
    # It can also be trained on from here.
    attach(ours, target_layers(ours, TARGETS), rank=4, alpha=4)
    load_lora(ours, path)
    peer.assert_agree(ours(*inputs), want)


def test_a_lora_of_other_layers_is_not_trained_on(networks, tmp_path):
    ours, _ = networks
    attach(ours, target_layers(ours, ["to_q"]), rank=4, alpha=4)
    path = tmp_path / "lora.safetensors"
    save_lora(path, trained_parameters(ours), scale=1.0)
    other = load("conftest")
    network = type(ours)(other.TINY_2_3)
    attach(network, target_layers(network, ["to_k"]), rank=4, alpha=4)
    with pytest.raises(InputError, match=r"layers are not those of lora\.target_modules"):
        load_lora(network, path)


def test_a_pattern_without_a_layer_names_those_there_are(networks):
    with pytest.raises(InputError, match=r"no layer ends in to_w; layers are .*attn1\.to_k"):
        target_layers(networks[0], ["to_w"])
