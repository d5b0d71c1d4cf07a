"""GGUF files: the same network as from safetensors, to the precision of their blocks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aiprod_core.errors import CheckpointError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import load_transformer
from aiprod_core.model.transformer import Transformer, TransformerConfig

gguf = pytest.importorskip("gguf")

Build = Callable[[TransformerConfig], Transformer]


def write_gguf(path: Path, transformer: Transformer, prefix: str) -> None:
    writer = gguf.GGUFWriter(path, "ltxv")
    for name, tensor in transformer.state_dict().items():
        array = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.F32
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(prefix + name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_quantised_transformer_reads_its_config_from_the_other_file(
    prefix: str, tmp_path: Path, tiny_config: TransformerConfig, randomised: Build
):
    transformer = randomised(tiny_config)
    write_gguf(tmp_path / "tiny-Q8_0.gguf", transformer, prefix)
    rest = tmp_path / "rest.safetensors"
    save_checkpoint(
        rest,
        [(key_maps.VIDEO_DECODER, torch.nn.Identity())],
        {"config": {"transformer": tiny_config.to_metadata()}},
    )
    checkpoint = open_checkpoint(tmp_path / "tiny-Q8_0.gguf", rest)
    loaded = load_transformer(checkpoint, dtype=torch.float32)
    for name, parameter in transformer.named_parameters():
        found = loaded.get_parameter(name)
        assert (found - parameter).abs().max() <= parameter.abs().max() / 64


def test_a_damaged_file_is_refused(tmp_path: Path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\x00" * 20)
    with pytest.raises(CheckpointError, match="GGUF"):
        open_checkpoint(path)
