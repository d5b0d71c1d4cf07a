"""Runs resume exactly, stop cleanly and refuse what does not fit."""

import json

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from aiprod_core.errors import InputError
from aiprod_trainer.optimizers import muon_and_adamw
from aiprod_trainer.run import Run, averaged_copy, read_state, update_average


class Settings(BaseModel):
    steps: int = 12


def start(folder, *, width=16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 12))
    average = averaged_copy(model)
    optimizers = muon_and_adamw(model, muon_lr=0.02, adamw_lr=0.01)
    state = {"model": model, "average": average, **optimizers}
    return Run(folder, state, Settings(), total_steps=12, seed=3)


def work(run, until=12):
    model, average = run.state["model"], run.state["average"]
    optimizers = [run.state["muon"], run.state["adamw"]]
    for step in run.steps():
        x = torch.randn(8, 12, generator=run.generator(step))
        x = x + float(run.numpy_generator(step).normal())
        loss = (model(x) - x.flip(1)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, model, step)
        run.log(loss=loss.item())
        if step + 1 == until:
            run._stop()


def test_a_stopped_and_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path):
    work(start(tmp_path / "whole"))
    work(start(tmp_path / "broken"), until=5)
    resumed = start(tmp_path / "broken")
    assert resumed.step == 5
    work(resumed)
    for name in ("model", "average", "muon", "adamw"):
        whole = read_state(tmp_path / "whole" / "state.safetensors", name)
        broken = read_state(tmp_path / "broken" / "state.safetensors", name)
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[key], broken[key]) for key in whole)


def test_a_half_written_checkpoint_is_never_resumed(tmp_path):
    work(start(tmp_path), until=5)
    (tmp_path / "state.tmp").write_bytes(b"killed while writing")
    assert start(tmp_path).step == 5


def test_another_architecture_is_refused(tmp_path):
    work(start(tmp_path), until=2)
    with pytest.raises(InputError, match="does not fit the configuration"):
        start(tmp_path, width=17)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    run = start(tmp_path)
    work(run, until=3)
    with pytest.raises(InputError, match="step 3"):
        run.log(loss=float("nan"))
    assert start(tmp_path).step == 3


def test_the_log_has_a_line_for_every_logged_step(tmp_path):
    work(start(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))


def test_ranks_draw_different_numbers(tmp_path):
    run = start(tmp_path)
    first = torch.randn(4, generator=run.generator(7))
    run.rank = 1
    assert not torch.equal(first, torch.randn(4, generator=run.generator(7)))
