"""Muon for matrices, AdamW for the rest, and learning-rate schedules.

Muon (Jordan et al., 2024) replaces the momentum of a weight matrix by the nearest orthogonal one,
by a quintic Newton-Schulz iteration. `torch.optim.Muon` takes 2-D weights only; here convolution
kernels count as matrices (out, in x kernel), which is what lets small codecs train in minutes.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# Coefficients of the quintic: they inflate small singular values fastest, and need not converge.
_A, _B, _C = 3.4445, -4.7750, 2.0315

# Beyond this (smaller) side the iteration costs more than a small network's own step on a CPU:
# larger matrices are orthogonalised in blocks of rows.
MUON_MAX_SIDE = 256


class Muon(Optimizer):
    """Orthogonalised momentum for parameters with at least two dimensions.

    The update has root-mean-square 0.2 x lr whatever the shape (Liu et al., 2025, eq. 4), so one
    learning rate serves every layer. Of several processes with equal gradients each iterates on
    its share of the matrices, and all hear of the result.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rank, self.world_size = rank, world_size
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "iterations": iterations,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every parameter that has a gradient. `closure` is not supported by Muon."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])  # Nesterov
                matrix = update.reshape(update.shape[0], -1)
                by_shape.setdefault(tuple(matrix.shape), []).append((parameter, matrix))
            # Matrices of one shape go through the iteration as one batch: small products are slow.
            for (rows, columns), entries in by_shape.items():
                stacked = torch.stack([matrix for _, matrix in entries])
                blocks = rows_in_blocks(rows, columns)
                stacked = stacked.reshape(len(entries) * blocks, rows // blocks, columns)
                updates = torch.zeros_like(stacked)
                share = slice(self.rank, None, self.world_size)
                updates[share] = orthogonalise(stacked[share], group["iterations"])
                if self.world_size > 1:
                    dist.all_reduce(updates)  # the others' places hold zeros
                updates = updates.reshape(len(entries), rows, columns)
                scale = 0.2 * math.sqrt(max(rows // blocks, columns)) * group["lr"]
                for (parameter, _), update in zip(entries, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-scale)


def rows_in_blocks(rows: int, columns: int) -> int:
    """Into how many blocks of rows a matrix is cut, so that no block has a side over the limit.

    The kernels before a depth-to-space step have eight times their output's channels, and each of
    the eight is a convolution of its own.
    """
    blocks = 1
    while min(rows // blocks, columns) > MUON_MAX_SIDE and rows % (2 * blocks) == 0:
        blocks *= 2
    return blocks


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(K, rows, columns) -> the same with all singular values near 1, by Newton-Schulz.

    The iterates of x are polynomials in the Gram matrix times x, so the iteration runs on the
    small square side alone and the wide matrix is read twice, whatever the number of steps.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    gram = x @ x.mT
    identity = torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
    product = identity.expand_as(gram)
    for _ in range(iterations):
        polynomial = _A * identity + _B * gram + _C * gram @ gram
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.mT if is_tall else x


def muon_and_adamw(
    model: nn.Module,
    *,
    muon_lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    iterations: int = 5,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Optimizer]:
    """Muon for hidden matrices, AdamW for vectors, tables, embeddings and first and last layers.

    Names are those of `named_parameters`; projections in and out of the data stay with AdamW, as
    the authors of Muon advise.
    """
    ends = (
        "conv_in",
        "conv_out",
        "conv_pre",
        "conv_post",
        "patchify_proj",
        "proj_out",
        "registers",
    )
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_hidden_matrix = (
            parameter.ndim >= 2
            and min(parameter.shape[0], parameter[0].numel()) > 8
            and "table" not in name
            and not any(end in name for end in ends)
        )
        (matrices if is_hidden_matrix else others).append(parameter)
    optimizers: dict[str, Optimizer] = {}
    if matrices:
        optimizers["muon"] = Muon(
            matrices,
            lr=muon_lr,
            weight_decay=weight_decay,
            iterations=iterations,
            rank=rank,
            world_size=world_size,
        )
    if others:  # a LoRA is nothing but matrices
        optimizers["adamw"] = AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizers


def set_learning_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Sets every group's rate to `factor` times the one it was built with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * factor


def warmup_then_linear_decay(step: int, total_steps: int, warmup_steps: int) -> float:
    """1 after the warm-up, falling linearly to 0 at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
