"""Rotary embedding: what the angles are, and how they turn queries and keys."""

import math

import pytest
import torch

from aiprod_core.model.rope import rotary_frequencies, rotary_table, rotate


def test_frequencies_run_from_a_quarter_turn_to_theta_times_that():
    frequencies = rotary_frequencies(5, 10000.0, torch.float64, torch.device("cpu"))
    want = [math.pi / 2 * 10000 ** (j / 4) for j in range(5)]
    torch.testing.assert_close(frequencies, torch.tensor(want))


def test_angles_go_frequency_by_frequency_with_the_axes_inside():
    positions = torch.tensor([5.0, 0.0, 100.0])[None, :, None]  # of 20, 100 and 400
    table = rotary_table(positions, (20, 100, 400), 16, theta=4.0, in_float64=True)
    slow, fast = math.pi / 2, 2 * math.pi  # 16 // (2 * 3) = 2 frequencies
    fractions = (-0.5, -1.0, -0.5)  # 2 p - 1
    angles = [0.0, 0.0, *(slow * f for f in fractions), *(fast * f for f in fractions)]
    torch.testing.assert_close(table.cos[0, 0], torch.tensor(angles).cos())
    torch.testing.assert_close(table.sin[0, 0], torch.tensor(angles).sin())


def test_what_the_axes_do_not_fill_is_left_unrotated_at_the_front():
    """Real video: 3 axes x 682 frequencies of 2048 pairs, so the first two are padding."""
    table = rotary_table(torch.rand(1, 3, 2), (20, 2048, 2048), 4096)
    assert table.cos.shape == (1, 2, 2048)
    assert table.sin[..., :2].eq(0).all() and table.cos[..., :2].eq(1).all()
    assert table.sin[..., 2:].ne(0).all()


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotation_keeps_lengths_and_is_undone_by_the_opposite_angle(is_interleaved: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 24, generator=generator)
    positions = torch.rand(2, 1, 5, generator=generator)
    table = rotary_table(positions, (1,), 24, theta=10.0, is_interleaved=is_interleaved)
    turned = rotate(x, table, heads=3)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    back = rotate(turned, table._replace(sin=-table.sin), heads=3)
    torch.testing.assert_close(back, x)
    assert not torch.allclose(turned, x)


def test_split_pairs_halves_of_a_head_and_interleaved_pairs_neighbours():
    quarter = torch.full((1, 1, 4), math.pi / 2)
    x = torch.arange(1.0, 9.0)[None, None]  # two heads of four
    table = rotary_table(torch.zeros(1, 1, 1), (1,), 8)._replace(
        cos=quarter.cos(), sin=quarter.sin()
    )
    split = rotate(x, table, heads=2)
    torch.testing.assert_close(split[0, 0], torch.tensor([-3.0, -4, 1, 2, -7, -8, 5, 6]))
    interleaved = rotate(x, table._replace(is_interleaved=True), heads=2)
    torch.testing.assert_close(interleaved[0, 0], torch.tensor([-2.0, 1, -4, 3, -6, 5, -8, 7]))


def test_half_precision_queries_are_turned_in_float32():
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rotary_table(torch.rand(1, 1, 4), (1,), 8, theta=100.0)
    turned = rotate(x, table, heads=1)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, rotate(x.float(), table, heads=1).bfloat16())


def test_positions_with_another_number_of_axes_are_refused():
    with pytest.raises(ValueError, match="2 axes"):
        rotary_table(torch.zeros(1, 2, 3), (20,), 8)
