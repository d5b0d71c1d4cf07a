"""Blocks that come one at a time: the same results, and only two of them in memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import load_transformer
from aiprod_core.loader.offload import stream_from_file, stream_from_memory
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.quantization.fp8 import cast_linears
from aiprod_core.types import Modality

Build = Callable[[TransformerConfig], Transformer]
Inputs = Callable[..., tuple[Modality, Modality]]


@pytest.fixture
def transformer(tiny_config: TransformerConfig, randomised: Build) -> Transformer:
    return randomised(replace(tiny_config, num_layers=5))


def save(path: Path, transformer: Transformer) -> Checkpoint:
    metadata = {"config": {"transformer": transformer.config.to_metadata()}}
    save_checkpoint(path, [(key_maps.TRANSFORMER, transformer)], metadata)
    return open_checkpoint(path)


def test_blocks_from_the_file_give_the_same_bits_at_every_step(
    tmp_path: Path, transformer: Transformer, modalities: Inputs
):
    checkpoint = save(tmp_path / "tiny.safetensors", transformer)
    streamed = load_transformer(checkpoint, leaves_blocks=True)
    stream = stream_from_file(streamed, checkpoint)
    for seed in range(2):
        inputs = modalities(transformer.config, seed)
        for expected, found in zip(transformer(*inputs), streamed(*inputs), strict=True):
            assert torch.equal(expected, found)
    stream.close()


def test_between_calls_the_blocks_are_in_the_file_and_two_at_most_in_memory(
    tmp_path: Path, transformer: Transformer, modalities: Inputs
):
    checkpoint = save(tmp_path / "tiny.safetensors", transformer)
    streamed = load_transformer(checkpoint, leaves_blocks=True)
    stream = stream_from_file(streamed, checkpoint)
    present: list[int] = []
    for block in streamed.transformer_blocks:
        block.register_forward_pre_hook(
            lambda *_: present.append(
                sum(not p.is_meta for b in streamed.transformer_blocks for p in b.parameters())
            )
        )
    streamed(*modalities(transformer.config))
    per_block = len(list(transformer.transformer_blocks[0].parameters()))
    assert present == [per_block] * 5
    assert all(p.is_meta for p in streamed.transformer_blocks.parameters())
    one = sum(p.nbytes for p in transformer.transformer_blocks[0].parameters())
    assert stream.peak_bytes == 2 * one
    assert stream.moved_bytes == 5 * one
    stream.close()


def test_blocks_in_main_memory_give_the_same_bits_and_come_back(
    transformer: Transformer, modalities: Inputs
):
    inputs = modalities(transformer.config)
    expected = transformer(*inputs)
    before = {name: p.data_ptr() for name, p in transformer.named_parameters()}
    stream = stream_from_memory(transformer, "cpu")
    for one, other in zip(expected, transformer(*inputs), strict=True):
        assert torch.equal(one, other)
    stream.close()
    assert {name: p.data_ptr() for name, p in transformer.named_parameters()} == before
    assert not transformer.transformer_blocks[0]._forward_hooks


def test_a_file_in_fp8_streams_as_it_is(
    tmp_path: Path, transformer: Transformer, modalities: Inputs
):
    cast_linears(transformer)
    checkpoint = save(tmp_path / "tiny-fp8.safetensors", transformer)
    streamed = load_transformer(checkpoint, dtype=torch.float32, leaves_blocks=True)
    stream = stream_from_file(streamed, checkpoint)
    inputs = modalities(transformer.config)
    for expected, found in zip(transformer(*inputs), streamed(*inputs), strict=True):
        assert torch.equal(expected, found)
    stream.close()


def test_a_block_that_fails_leaves_nothing_in_memory(
    tmp_path: Path, transformer: Transformer, modalities: Inputs
):
    checkpoint = save(tmp_path / "tiny.safetensors", transformer)
    streamed = load_transformer(checkpoint, leaves_blocks=True)
    stream = stream_from_file(streamed, checkpoint)
    video, audio = modalities(transformer.config)
    with pytest.raises(RuntimeError):
        streamed(replace(video, context=video.context[..., :3]), audio)
    assert all(p.is_meta for p in streamed.transformer_blocks.parameters())
    for found in streamed(video, audio):  # and it can go on
        assert found.isfinite().all()
    stream.close()


def test_quantising_and_streaming_from_the_file_at_once_is_refused(
    tmp_path: Path, transformer: Transformer
):
    checkpoint = save(tmp_path / "tiny.safetensors", transformer)
    with pytest.raises(InputError, match="models convert"):
        load_transformer(checkpoint, quantization="int8", leaves_blocks=True)
