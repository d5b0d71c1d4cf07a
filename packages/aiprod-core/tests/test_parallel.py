"""Two processes together give what one gives alone."""

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aiprod_core.errors import InputError
from aiprod_core.model.transformer import Perturbations, Transformer, TransformerConfig
from aiprod_core.parallel import branch_parallel, in_parallel, join, sequence_parallel, token_shares
from aiprod_core.types import Modality

Build = Callable[[TransformerConfig], Transformer]
Inputs = Callable[..., tuple[Modality, Modality]]

PERTURBED = Perturbations(({}, {"SKIP_VIDEO_SELF_ATTN": (1,), "SKIP_A2V_CROSS_ATTN": None}))


def cases(inputs: tuple[Modality, Modality]) -> list[tuple]:
    """Calls that differ in what is given: both, perturbed, masked, one stream alone."""
    video, audio = inputs
    tokens = video.latent.shape[1]
    weights = torch.rand(2, tokens, tokens, generator=torch.Generator().manual_seed(1))
    marker = (torch.arange(tokens) < 3).float()[None, :, None].expand(2, -1, -1)
    masked = replace(video, attention_mask=weights, keyframe_marker=marker)
    one_level = replace(video, timesteps=video.timesteps[:, :1])
    return [
        (video, audio),
        (video, audio, PERTURBED),
        (masked, audio),
        (one_level, replace(audio, enabled=False)),
    ]


def work(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    transformer, inputs, expected = torch.load(folder / "case.pt", weights_only=False)
    worst = {}
    with torch.no_grad():
        for name in ("sequence", "guidance"):
            with in_parallel(name, transformer) as model:
                found = [model(*case) for case in cases(inputs)]
            worst[name] = max(
                float((a - b).abs().max())
                for pair, other in zip(found, expected, strict=True)
                for a, b in zip(pair, other, strict=True)
            )
        alone = [transformer(*case) for case in cases(inputs)]  # the network is as it was
    worst["after"] = max(
        float((a[0] - b[0]).abs().max()) for a, b in zip(alone, expected, strict=True)
    )
    worst["shares"] = float(token_shares(5) != [3, 2])
    torch.save(worst, folder / f"worst-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_by_tokens_and_by_passes(
    tmp_path: Path, tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    # 12 video tokens and 5 of sound: one of them does not divide.
    transformer = randomised(tiny_config)
    inputs = modalities(tiny_config)
    with torch.no_grad():
        expected = [transformer(*case) for case in cases(inputs)]
    torch.save((transformer, inputs, expected), tmp_path / "case.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked: a spawned process could not import a test file by its name.
    mp.start_processes(work, (port, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        worst = torch.load(tmp_path / f"worst-{rank}.pt")
        assert max(worst.values()) < 1e-5, worst


def test_one_process_alone_is_told_how_to_start_several(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun"):
        join(torch.device("cpu"))


def test_heads_that_cannot_be_shared_are_refused(
    tiny_config: TransformerConfig, randomised: Build, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(InputError, match="divides"), sequence_parallel(randomised(tiny_config)):
        pass


def test_a_single_process_of_a_group_computes_all_samples(
    tiny_config: TransformerConfig,
    randomised: Build,
    modalities: Inputs,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    transformer, inputs = randomised(tiny_config), modalities(tiny_config)
    for one, other in zip(branch_parallel(transformer)(*inputs), transformer(*inputs), strict=True):
        assert torch.equal(one, other)
