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

PLAN = FoldPlan(
    model={},
    levels={"a": 2},
    scales={"a": 0.25},
    lr=0.02,
    memory_options=MemoryOptions(micro_batch_size=1),
)
ADAM = replace(PLAN, levels={"a": 0})


@pytest.mark.parametrize(("plan", "exponent"), [(PLAN, FOLDED_EXPONENT), (ADAM, ADAM_EXPONENT)])
def test_a_shorter_run_takes_a_higher_rate_and_nothing_else_changes(
    plan: FoldPlan, exponent: float
) -> None:
    for steps in (2400, 600, 150):
        found = plan_for_length(plan, steps, 600)
        assert found.lr == pytest.approx(0.02 * (600 / steps) ** exponent, rel=5e-3)
        assert replace(found, lr=plan.lr) == plan


def test_the_correction_ends_at_the_largest_ratio_measured() -> None:
    farthest = plan_for_length(PLAN, 100, int(100 * MAX_LENGTH_RATIO))
    assert plan_for_length(PLAN, 100, 150_000) == farthest
    assert plan_for_length(PLAN, 150_000, 100).lr == pytest.approx(0.02**2 / farthest.lr, rel=1e-2)


@pytest.mark.parametrize(("to_adam", "remaining"), [(False, GAP_REMAINING), (True, 1.0)])
@pytest.mark.parametrize("full_steps", [1200, 150_000])
def test_from_four_times_the_length_on_the_prediction_is_as_measured(
    to_adam: bool, remaining: float, full_steps: int
) -> None:
    found = predict_full_run(Difference(-0.1, 0.02), to_adam, num_steps=300, full_steps=full_steps)
    assert found.mean == pytest.approx(-0.1 * remaining)
    transfer = math.hypot(TRANSFER_DEVIATION, 0.1 * TRANSFER_SHARE)
    assert found.half_width == pytest.approx(math.hypot(0.02 * remaining, 1.96 * transfer))


@given(
    st.floats(-1, 1), st.floats(0, 1), st.booleans(), st.integers(1, 10_000), st.integers(1, 10_000)
)
def test_a_prediction_lies_between_that_of_equal_and_of_four_times_the_length(
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
