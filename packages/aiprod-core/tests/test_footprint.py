"""Costs found on the meta device are those of known operations."""

import torch
import torch.nn.functional as F
from torch import nn

from aiprod_core.footprint import Footprint, footprint


def test_a_product_costs_two_operations_a_multiply_add_and_holds_its_result():
    linear = nn.Linear(32, 64, device="meta")
    x = torch.empty(8, 32, device="meta")
    cost = footprint(lambda: linear(x))
    assert cost.flops == 2 * 8 * 32 * 64
    assert cost.peak_bytes == 8 * 64 * 4


def test_results_that_are_dropped_no_longer_count():
    x = torch.empty(1000, device="meta")

    def chain() -> torch.Tensor:
        y = x
        for _ in range(10):
            y = y + 1
        return y

    assert footprint(chain).peak_bytes == 2 * 4000  # the last two


def test_views_and_changes_in_place_take_nothing():
    x = torch.empty(1000, device="meta")
    assert footprint(lambda: x.view(10, 100).transpose(0, 1)[:5].add_(1)).peak_bytes == 0


def test_attention_counts_its_products_and_no_matrix_of_all_pairs():
    q = torch.empty(1, 2, 100, 16, device="meta")
    k = torch.empty(1, 2, 300, 16, device="meta")
    cost = footprint(lambda: F.scaled_dot_product_attention(q, k, k))
    assert cost.flops == 2 * 2 * 100 * 300 * (16 + 16)
    assert cost.peak_bytes == q.numel() * 4


def test_calls_after_each_other_add_operations_and_share_memory():
    both = Footprint(10, 300) + Footprint(5, 200).times(4)
    assert both == Footprint(30, 300)
