"""Muon's orthogonalisation and the split of parameters between Muon and AdamW."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from aiprod_trainer.optimizers import (
    Muon,
    muon_and_adamw,
    orthogonalise,
    rows_in_blocks,
    set_learning_rate,
    warmup_then_linear_decay,
)


@pytest.mark.parametrize("shape", [(2, 24, 80), (1, 80, 24), (3, 32, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    wide = values[..., : min(shape[1:]) // 2]  # the smallest of a square matrix converge last
    assert wide.min() > 0.5
    assert values.max() < 1.3


def test_orthogonalisation_keeps_the_singular_vectors():
    u = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    v = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(2)))[0][:16]
    matrix = u @ torch.diag(torch.linspace(1, 3, 16)) @ v
    overlap = (u.T @ orthogonalise(matrix[None])[0] @ v.T).diagonal()
    assert overlap.min() > 0.6


def test_the_update_size_does_not_depend_on_the_shape():
    for shape in [(16, 64), (64, 16), (32, 8, 3, 3, 3)]:
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([parameter], lr=0.1).step()
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)


def test_a_wide_matrix_is_orthogonalised_in_blocks_of_rows():
    assert rows_in_blocks(200, 5000) == 1
    assert rows_in_blocks(768, 5184) == 4
    assert rows_in_blocks(5184, 96) == 1  # its smaller side is within the limit
    parameter = nn.Parameter(torch.zeros(1024, 300))
    parameter.grad = torch.randn(1024, 300, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=1.0).step()
    for block in parameter.detach().chunk(4):
        values = torch.linalg.svdvals(block / (0.2 * 300**0.5))
        assert values.min() > 0.3 and values.max() < 1.3


def _step_in_a_group(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parameters = _matrices_with_gradients()
    Muon(parameters, lr=0.1, rank=rank, world_size=2).step()
    torch.save([p.detach() for p in parameters], f"{folder}/{rank}.pt")
    dist.barrier()  # gloo aborts a process whose partner leaves while its threads still talk
    dist.destroy_process_group()


def _matrices_with_gradients() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(12, 20)) for _ in range(3)]
    parameters.append(nn.Parameter(torch.zeros(6, 4)))
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def test_two_processes_share_the_work_and_get_the_same_weights(tmp_path):
    torch.multiprocessing.spawn(_step_in_a_group, (str(tmp_path),), nprocs=2)
    alone = _matrices_with_gradients()
    Muon(alone, lr=0.1).step()
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one.detach(), other)


def test_a_convolution_learns_a_known_kernel():
    torch.manual_seed(0)
    truth, model = nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3)
    optimizer = Muon([model.weight], lr=0.1)
    losses = []
    for step in range(80):
        set_learning_rate([optimizer], warmup_then_linear_decay(step, 80, 5))
        x = torch.randn(4, 8, 8, 8)
        made, wanted = (nn.functional.conv2d(x, layer.weight) for layer in (model, truth))
        loss = (made - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50


def test_every_trainable_parameter_has_exactly_one_optimizer():
    model = nn.ModuleDict(
        {"conv_in": nn.Conv3d(3, 32, 3), "hidden": nn.Linear(32, 64), "norm": nn.LayerNorm(64)}
    )
    optimizers = muon_and_adamw(model, muon_lr=1.0, adamw_lr=1.0)
    groups = {
        name: {id(p) for group in o.param_groups for p in group["params"]}
        for name, o in optimizers.items()
    }
    assert groups["muon"] == {id(model["hidden"].weight)}
    assert groups["adamw"] == {id(p) for p in model.parameters()} - groups["muon"]


def test_the_schedule_warms_up_and_ends_at_zero():
    factors = [warmup_then_linear_decay(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == 1
    assert factors[100] == 0
