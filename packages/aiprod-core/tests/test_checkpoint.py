"""Reading checkpoints: names, shapes, damage, and what a person is told about it."""

import json
import logging
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from aiprod_core.errors import CheckpointError
from aiprod_core.loader.checkpoint import KeyMap, load_module, open_checkpoint, save_checkpoint

KEYS = KeyMap(prefixes=(("net.", ""), ("statistics.", "statistics.")), ignored=("extra",))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.statistics = nn.Module()
        self.statistics.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "net.first.weight": torch.randn(4, 3, generator=generator),
        "net.first.bias": torch.randn(4, generator=generator),
        "statistics.mean": torch.randn(4, generator=generator),
        "net.extra.thing": torch.zeros(1),
        "other.weight": torch.zeros(1),
    }


def write(path, content, **metadata):
    save_file(content, path, metadata={k: json.dumps(v) for k, v in metadata.items()} or None)
    return path


def load(path, **options):
    return load_module(open_checkpoint(path), KEYS, Net, **options)


def test_every_parameter_and_buffer_comes_from_the_file(tmp_path):
    content = tensors()
    net = load(write(tmp_path / "a.safetensors", content))
    assert torch.equal(net.first.weight, content["net.first.weight"])
    assert torch.equal(net.statistics.mean, content["statistics.mean"])
    assert not net.first.weight.requires_grad


def test_missing_names_are_listed(tmp_path):
    content = tensors()
    del content["net.first.bias"]
    with pytest.raises(CheckpointError, match=r"1 of 3 tensors are missing: first\.bias"):
        load(write(tmp_path / "a.safetensors", content))


def test_wrong_shapes_name_the_key_and_both_shapes(tmp_path):
    content = tensors() | {"net.first.weight": torch.zeros(4, 5)}
    with pytest.raises(CheckpointError, match=r"net\.first\.weight is \[4, 5\].*\[4, 3\]"):
        load(write(tmp_path / "a.safetensors", content))


def test_unused_names_are_reported_unless_the_table_ignores_them(tmp_path, caplog):
    content = tensors() | {"net.second.weight": torch.zeros(1)}
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "a.safetensors", content))
    assert "net.second.weight" in caplog.text
    assert "extra" not in caplog.text
    assert "other" not in caplog.text


def test_a_dtype_casts_floats_and_leaves_float8_alone(tmp_path):
    content = tensors()
    content["net.first.weight"] = content["net.first.weight"].to(torch.float8_e4m3fn)
    net = load(write(tmp_path / "a.safetensors", content), dtype=torch.bfloat16)
    assert net.first.bias.dtype == torch.bfloat16
    assert net.first.weight.dtype == torch.float8_e4m3fn


def test_saving_and_loading_is_the_identity_under_the_published_names(tmp_path):
    net = load(write(tmp_path / "a.safetensors", tensors()))
    save_checkpoint(tmp_path / "b.safetensors", [(KEYS, net)], {"config": {"a": 1}})
    again = open_checkpoint(tmp_path / "b.safetensors")
    assert set(again.tensors) == {"net.first.weight", "net.first.bias", "statistics.mean"}
    assert again.config == {"a": 1}
    assert torch.equal(load(tmp_path / "b.safetensors").first.weight, net.first.weight)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.3.0", (2, 3, 0)), ("2.3.rc1", (2, 3)), ("2.4-rc2", (2, 4)), ("2.5", (2, 5)), ("", ())],
)
def test_versions_stop_at_the_first_tag(tmp_path, text, version):
    save_file(tensors(), tmp_path / "a.safetensors", metadata={"model_version": text})
    assert open_checkpoint(tmp_path / "a.safetensors").version == version
    assert () < (2,)


def test_a_pickle_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"weight": [1.0] * 100}))
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(path)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    # 0x80 is a pickle's first byte, and the low byte of this header's length.
    for padding in range(400):
        path = write(tmp_path / "a.safetensors", tensors(), note="x" * padding)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert load(path).first.bias.shape == (4,)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_one_clear_error(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("cut") / "a.safetensors", tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"cut short|damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "header", [b"{", b"{]", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b'{"a": {"data_offsets": []}}']
)
def test_a_damaged_header_is_one_clear_error(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path)


def test_no_metadata_says_what_to_give_instead(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "a.safetensors", tensors()))
    with pytest.raises(CheckpointError, match='no "config" in the header metadata'):
        checkpoint.section("vae")


def test_a_lora_given_as_a_model_is_told_apart(tmp_path):
    content = {"diffusion_model.a.lora_A.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="--lora"):
        open_checkpoint(write(tmp_path / "a.safetensors", content)).section("transformer")


def test_an_absent_section_names_those_that_are_there(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "a.safetensors", tensors(), config={"vae": {}}))
    with pytest.raises(CheckpointError, match=r'no "vocoder" section; it has vae'):
        checkpoint.section("vocoder")
