"""Data parallelism over gloo: one process a core, or one a device, started by torchrun.

    torchrun --nproc-per-node 2 -m aiprod_trainer.train_base CONFIG --out FOLDER

On networks this small two one-thread processes do twice the work of one two-thread process.
"""

import os

import torch
import torch.distributed as dist
from torch import nn


def join() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) when it was not started by torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 1
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    return dist.get_rank(), world_size


def average_gradients(model: nn.Module, world_size: int) -> None:
    """Replaces every gradient by its mean over the processes, in one message."""
    if world_size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
