import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.trials.extrapolation import (
    ADAM_EXPONENT,
    FOLDED_EXPONENT,
    GAP_REMAINING,
    MAX_LENGTH_RATIO,
    TRANSFER_DEVIATION,
    TRANSFER_SHARE,
    plan_for_length,
    predict_full_run,
)
from tuner.trials.runner import Difference


@pytest.fixture
def plan() -> FoldPlan:
    return FoldPlan(
        model={},
        levels={"a": 2},
        scales={"a": 0.25},
        lr=0.02,
        memory_options=MemoryOptions(micro_batch_size=1),
    )


def test_the_full_length_takes_the_rate_of_the_plan(plan: FoldPlan) -> None:
    assert plan_for_length(plan, 600, 600) == plan


def test_a_shorter_run_takes_a_higher_rate_and_nothing_else_changes(plan: FoldPlan) -> None:
    short = plan_for_length(plan, 150, 600)
    assert short.lr == pytest.approx(0.02 * 4**FOLDED_EXPONENT, rel=5e-3)
    assert replace(short, lr=plan.lr) == plan
    assert (
        plan_for_length(plan, 1200, 600).lr
        < plan.lr
        < plan_for_length(plan, 300, 600).lr
        < short.lr
    )


def test_adam_takes_a_power_of_its_own(plan: FoldPlan) -> None:
    adam = replace(plan, levels={"a": 0})
    assert plan_for_length(adam, 150, 600).lr == pytest.approx(0.02 * 4**ADAM_EXPONENT, rel=5e-3)
    assert plan_for_length(adam, 150, 600).lr < plan_for_length(plan, 150, 600).lr


def test_the_correction_ends_where_nothing_was_measured(plan: FoldPlan) -> None:
    farthest = plan_for_length(plan, 100, int(100 * MAX_LENGTH_RATIO))
    assert plan_for_length(plan, 100, 150_000) == farthest
    assert plan_for_length(plan, 150_000, 100).lr == pytest.approx(0.02**2 / farthest.lr, rel=1e-2)


def test_four_times_as_long_a_gap_is_what_was_measured_there() -> None:
    found = predict_full_run(Difference(-0.1, 0.02), False, num_steps=300, full_steps=1200)
    assert found.mean == pytest.approx(-0.1 * GAP_REMAINING)
    assert found.half_width**2 == pytest.approx(
        (0.02 * GAP_REMAINING) ** 2
        + 1.96**2 * (TRANSFER_DEVIATION**2 + (0.1 * TRANSFER_SHARE) ** 2)
    )
    longer = predict_full_run(Difference(-0.1, 0.02), False, num_steps=300, full_steps=150_000)
    assert longer == found


def test_a_gap_to_adam_stays_and_is_less_sure() -> None:
    found = predict_full_run(Difference(-0.1, 0.02), True, num_steps=300, full_steps=1200)
    assert found.mean == -0.1
    transfer = math.hypot(TRANSFER_DEVIATION, 0.1 * TRANSFER_SHARE)
    assert found.half_width == pytest.approx(math.hypot(0.02, 1.96 * transfer))


@given(
    st.floats(-1, 1), st.floats(0, 1), st.booleans(), st.integers(1, 10_000), st.integers(1, 10_000)
)
def test_a_prediction_lies_between_what_was_measured_and_four_times_as_long(
    mean: float, half_width: float, to_adam: bool, num_steps: int, full_steps: int
) -> None:
    gap = Difference(mean, half_width)
    found = predict_full_run(gap, to_adam, num_steps=num_steps, full_steps=full_steps)
    farthest = predict_full_run(gap, to_adam, num_steps=1, full_steps=4)
    longer = predict_full_run(gap, to_adam, num_steps=num_steps, full_steps=2 * full_steps)
    if full_steps <= num_steps:
        assert found == gap
    assert abs(farthest.mean) - 1e-9 <= abs(longer.mean) <= abs(found.mean) + 1e-9
    assert abs(found.mean) <= abs(mean)
    assert found.mean * mean >= 0
