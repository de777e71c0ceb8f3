import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning import FOAM
from foam_lightning.optim.state import (
    CODES_PER_SCALE,
    read_moment,
    state_bytes,
    state_layout,
    write_moment_,
)
from tests.support.training import moments, parameters, train

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 700)),
    st.tuples(st.integers(1, 9)),
    st.just(()),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 300)),
)


def allocated(columns, rows=3, dtype=torch.int8):
    return {
        key: torch.zeros(shape, dtype=kept)
        for key, (shape, kept) in state_layout((rows, columns), 0, dtype).items()
    }


@given(SHAPES, st.integers(0, 12), st.sampled_from(DTYPES))
def test_bytes_in_closed_form_equal_the_bytes_allocated(shape, level, dtype):
    optimizer = FOAM(parameters([shape]), level=level, state_dtype=dtype)
    train(optimizer, [0])
    assert sum(t.nbytes for t in moments(optimizer)) == state_bytes(shape, level, dtype)


def test_int8_takes_a_byte_a_value_and_a_scale_for_256_of_a_row():
    assert state_bytes((6, 2048), 2, torch.int8) == 2 * 6 * (512 + 2 * 4)
    assert state_bytes((6, 4), 2, torch.int8) == state_bytes((6, 4), 2, torch.float32)


@given(st.integers(2, 3 * CODES_PER_SCALE), st.integers(-30, 30), st.integers(0, 2**31))
def test_int8_is_within_half_a_code(columns, exponent, seed):
    random = torch.Generator().manual_seed(seed)
    m = torch.randn(3, columns, generator=random) * 2.0**exponent
    v = m.square() * torch.rand(3, columns, generator=random)
    state = allocated(columns)
    for moment, value in (("exp_avg", m), ("exp_avg_sq", v)):
        write_moment_(state, moment, value, None)
        back = read_moment(state, moment)
        largest = torch.stack(
            [part.abs().amax(-1) for part in value.split(CODES_PER_SCALE, dim=-1)], -1
        )
        largest = largest.repeat_interleave(CODES_PER_SCALE, dim=-1)[..., :columns]
        y = value.abs() / largest
        # Half a code: y = (code / 127)**2 moves by 2 * sqrt(y) / 127 a code, v's by 4 * y**.75.
        step = (2 * y.sqrt() + 1 / 127) / 127 if moment == "exp_avg" else (4 * y**0.75 + 0.01) / 255
        assert ((back - value).abs() <= 0.51 * step * largest).all()


def test_int8_rounds_stochastically_to_the_right_mean():
    value = torch.rand(3, 600)
    total = torch.zeros(3, 600)
    for seed in range(400):
        state = allocated(600)
        write_moment_(state, "exp_avg_sq", value, seed * 7919)
        total += read_moment(state, "exp_avg_sq")
    # The code is unbiased; its fourth power is convex, and off by a share of a code squared.
    assert (total / 400 - value).mean().abs() < 2e-3


def test_second_moments_that_are_not_zero_never_become_zero():
    value = torch.full((3, 600), 1e-30)
    value[:, 0] = 1.0
    for seed in (None, 1, 2):
        state = allocated(600)
        write_moment_(state, "exp_avg_sq", value, seed)
        assert (read_moment(state, "exp_avg_sq") > 0)[:, :CODES_PER_SCALE].all()


@pytest.mark.parametrize("seed", [None, 5])
def test_int8_of_zeros_extremes_and_nan(seed):
    for value in (0.0, 1e-40, 3e38):
        state = allocated(300)
        x = torch.full((3, 300), value)
        for moment in ("exp_avg", "exp_avg_sq"):
            write_moment_(state, moment, x, seed)
            torch.testing.assert_close(read_moment(state, moment), x, rtol=0.05, atol=1e-38)
    x = torch.ones(3, 300)
    x[1, 2] = torch.nan
    write_moment_(state, "exp_avg", x, seed)
    assert read_moment(state, "exp_avg")[1, :CODES_PER_SCALE].isnan().all()
    assert read_moment(state, "exp_avg")[[0, 2]].isfinite().all()


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("run", DTYPES)
def test_state_of_any_dtype_loads_into_any_other(saved, run):
    first, second = FOAM(parameters(), state_dtype=saved), FOAM(parameters(), state_dtype=run)
    train(first, range(3))
    second.load_state_dict(first.state_dict())
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert a["step"] == b["step"] == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                read_moment(a, moment), read_moment(b, moment), rtol=0.05, atol=0.02
            )
