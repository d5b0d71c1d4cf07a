"""One generation on several processes, each with the whole network: by tokens or by guidance pass.

`sequence_parallel` shares the tokens of both streams (Ulysses, Jacobs et al. 2023,
arXiv:2309.14509). Everything but attention between tokens works on each process's own; for
attention an all-to-all exchanges tokens for heads, so that each process has all tokens of some
heads, and another changes them back. The text is the same everywhere and is not exchanged.
`branch_parallel` shares the samples of a call, that is the guidance passes. Both can be had of a
network that knows nothing of them, and give what one process gives, up to the order of summation.

Every process runs the same sampler with the same seed; only the network's work is shared.

Letters: B batch, N tokens, S key tokens, heads, d head width, P processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from aiprod_core.components.guiders import Model
from aiprod_core.errors import InputError
from aiprod_core.model.attention import attention
from aiprod_core.model.transformer import Perturbations, Transformer
from aiprod_core.types import Modality

WAYS = ("none", "sequence", "guidance")

# The attentions between tokens of a block, with the streams of their queries and of their keys.
ATTENTIONS = {
    "attn1": ("video", "video"),
    "audio_attn1": ("audio", "audio"),
    "audio_to_video_attn": ("video", "audio"),
    "video_to_audio_attn": ("audio", "video"),
}


def join(device: torch.device) -> None:
    """Makes this process one of those that `torchrun` has started. Raises InputError if none."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise InputError(
            "several processes are asked for, and this is the only one; start them with "
            "torchrun --nproc-per-node 2 -m aiprod_pipelines.cli generate ..."
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def is_first() -> bool:
    """Whether this process is the one that writes: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def in_parallel(way: str, transformer: Transformer) -> Iterator[Model]:
    """The transformer shared between all processes in one of WAYS."""
    if way == "sequence":
        with sequence_parallel(transformer) as model:
            yield model
    elif way == "guidance":
        yield branch_parallel(transformer)
    else:
        yield transformer


# ------------------------------------------------------------------------------------------- tokens


@contextmanager
def sequence_parallel(transformer: Transformer) -> Iterator[Model]:
    """The transformer with its tokens shared; its inputs and results are whole on all processes.

    Raises InputError where the heads cannot be shared evenly.
    """
    processes = dist.get_world_size()
    config = transformer.config
    for name in ("num_attention_heads", "audio_num_attention_heads"):
        if getattr(config, name) % processes:
            raise InputError(
                f"{name} {getattr(config, name)} cannot be shared by {processes} processes; "
                "take a number that divides it."
            )
    totals: dict[str, int] = {}
    changed = [
        (getattr(block, name), streams)
        for block in transformer.transformer_blocks
        for name, streams in ATTENTIONS.items()
        if hasattr(block, name)
    ]

    def model(
        video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        given = {"video": video, "audio": audio}
        totals.update({n: m.latent.shape[1] for n, m in given.items() if m is not None})
        spans = {name: own_span(total) for name, total in totals.items()}
        parts = [None if m is None else _tokens(m, spans[name]) for name, m in given.items()]
        velocities = transformer(parts[0], parts[1], perturbations)
        video_velocity, audio_velocity = (
            None if v is None else _whole(v, 1, spans[name], totals[name])
            for name, v in zip(given, velocities, strict=True)
        )
        return video_velocity, audio_velocity

    for attn, streams in changed:
        attn.attend = partial(_attend, totals, *streams)
    try:
        yield model
    finally:
        for attn, _ in changed:
            del attn.attend  # the instance's, which hid the class's


def _attend(
    totals: dict[str, int],
    stream: str,
    context_stream: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Attention of own tokens (B, heads, N / P, d) to those of all processes."""
    whole = attention(
        tokens_for_heads(q, totals[stream]),
        tokens_for_heads(k, totals[context_stream]),
        tokens_for_heads(v, totals[context_stream]),
        mask,
    )
    return heads_for_tokens(whole, totals[stream])


def tokens_for_heads(x: Tensor, total: int) -> Tensor:
    """(B, heads, own tokens, d) -> (B, heads / P, all tokens, d)."""
    shares = token_shares(total)
    sent = x.chunk(len(shares), dim=1)
    shape = sent[0].shape
    shapes = [(shape[0], shape[1], share, shape[3]) for share in shares]
    return torch.cat(_exchange(sent, shapes), dim=2)


def heads_for_tokens(x: Tensor, total: int) -> Tensor:
    """(B, heads / P, all tokens, d) -> (B, heads, own tokens, d)."""
    shares = token_shares(total)
    own = shares[dist.get_rank()]
    shapes = [(x.shape[0], x.shape[1], own, x.shape[3])] * len(shares)
    return torch.cat(_exchange(x.split(shares, dim=2), shapes), dim=1)


def _exchange(sent: tuple[Tensor, ...], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Sends the i-th tensor to process i and receives one of the i-th shape from it."""
    flat = torch.cat([tensor.reshape(-1) for tensor in sent])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [tensor.numel() for tensor in sent])
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def token_shares(total: int) -> list[int]:
    """Tokens of each process, as even as can be. Raises InputError for fewer than processes."""
    processes = dist.get_world_size()
    if total < processes:
        raise InputError(f"{total} tokens cannot be shared by {processes} processes; take fewer.")
    return [total // processes + (rank < total % processes) for rank in range(processes)]


def own_span(total: int) -> slice:
    shares = token_shares(total)
    start = sum(shares[: dist.get_rank()])
    return slice(start, start + shares[dist.get_rank()])


def _tokens(modality: Modality, span: slice) -> Modality:
    """A modality's own tokens; attention weights stay whole, as attention sees all tokens."""
    marker, timesteps = modality.keyframe_marker, modality.timesteps
    return replace(
        modality,
        latent=modality.latent[:, span],
        timesteps=timesteps[:, span] if timesteps.shape[1] > 1 else timesteps,
        positions=modality.positions[:, :, span],
        keyframe_marker=None if marker is None else marker[:, span],
    )


# ------------------------------------------------------------------------------------------- passes


def branch_parallel(model: Model) -> Model:
    """The model with the samples of a call shared. More processes than samples are of no use."""

    def shared(
        video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        given = {"video": video, "audio": audio}
        batch = next(len(m.latent) for m in given.values() if m is not None)
        processes, rank = dist.get_world_size(), dist.get_rank()
        # The largest shares first, as `Tensor.chunk` has them; the last processes may have none.
        size = -(-batch // processes)
        rows = slice(min(rank * size, batch), min((rank + 1) * size, batch))
        velocities: tuple[Tensor | None, Tensor | None] = (None, None)
        if rows.stop > rows.start:
            parts = [None if m is None else _samples(m, rows) for m in given.values()]
            if perturbations is not None:
                perturbations = Perturbations(perturbations.samples[rows])
            velocities = model(parts[0], parts[1], perturbations)
        video_velocity, audio_velocity = (
            None
            if modality is None
            else _whole(
                modality.latent[:0].float() if velocity is None else velocity.float(),
                0,
                rows,
                batch,
            )
            for modality, velocity in zip(given.values(), velocities, strict=True)
        )
        return video_velocity, audio_velocity

    return shared


def _samples(modality: Modality, rows: slice) -> Modality:
    def own(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or len(tensor) == 1 else tensor[rows]

    batched = ("positions", "context_mask", "attention_mask", "keyframe_marker")
    return replace(
        modality,
        latent=modality.latent[rows],
        sigma=modality.sigma[rows],
        timesteps=modality.timesteps[rows],
        context=modality.context if len(modality.context) == 1 else modality.context[rows],
        **{name: own(getattr(modality, name)) for name in batched},
    )


def _whole(part: Tensor, dim: int, span: slice, total: int) -> Tensor:
    """All processes' parts along an axis: zeros where others are, and the sum."""
    shape = list(part.shape)
    shape[dim] = total
    whole = part.new_zeros(shape)
    whole.narrow(dim, span.start, span.stop - span.start).copy_(part)
    dist.all_reduce(whole)
    return whole
