import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.optim.rounding import random_bits, to_bfloat16, to_integer

SEEDS = st.integers(-(2**31), 2**31 - 1)


@given(st.floats(-(2.0**127), 2.0**127, width=32), SEEDS)
def test_bfloat16_is_one_of_the_two_neighbours(value, seed):
    x = torch.full((64,), value)
    toward_zero = (x.view(torch.int32) & -0x10000).view(torch.float32)
    away = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    rounded = to_bfloat16(x, seed).float()
    assert ((rounded == toward_zero) | (rounded == away)).all()
    if x[0] == toward_zero[0]:
        assert torch.equal(rounded, x)


@given(st.floats(0.125, 100.0, width=32), SEEDS)
def test_the_mean_of_rounded_numbers_is_the_number(value, seed):
    x = torch.full((2**14,), value)
    unit = 2.0 ** (math.floor(math.log2(value)) - 7)
    # Five standard deviations of a mean of 2**14 numbers that are at most half a unit off.
    assert to_bfloat16(x, seed).double().mean().item() == pytest.approx(value, abs=0.02 * unit)
    assert to_integer(x, seed).double().mean().item() == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0, -0.0, 1.5])
def test_exact_values_do_not_change(value):
    x = torch.full((1000,), value)
    assert torch.equal(to_bfloat16(x, 3).float().nan_to_num(7.0), x.nan_to_num(7.0))


def test_random_bits_repeat_and_depend_on_seed_and_position():
    like = torch.zeros(50, 40)
    assert torch.equal(random_bits(like, 5), random_bits(like, torch.tensor(5, dtype=torch.int32)))
    assert (random_bits(like, 5) == random_bits(like, 6)).float().mean() < 0.01
    assert random_bits(like, 5).unique().numel() == 2000


@pytest.mark.parametrize("bit", range(32))
def test_every_random_bit_is_a_fair_coin(bit):
    bits = torch.stack([random_bits(torch.zeros(2**12), seed) >> bit & 1 for seed in range(16)])
    assert bits.float().mean().item() == pytest.approx(0.5, abs=0.01)
    # Also between neighbouring positions, and between neighbouring seeds.
    for a, b in ((bits[:, 1:], bits[:, :-1]), (bits[1:], bits[:-1])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.01)
