"""When a step is taken, skipped, rolled back or the last."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.callbacks.spike_guard import LIMITS, StepAction, StepPolicy

TAKE, SKIP, ROLL_BACK, STOP = StepAction
NAN = math.nan


def judge(skipped: int = 2, rollbacks: int = 0) -> StepPolicy:
    return StepPolicy(max_skipped_steps=skipped, spike_nats=1.0, max_rollbacks=rollbacks)


def verdicts(
    of: StepPolicy, losses: list[float], *, finite: bool = True, back: bool = True
) -> list[StepAction]:
    return [of.judge(x, has_finite_gradients=finite, can_roll_back=back) for x in losses]


def settled(rollbacks: int) -> StepPolicy:
    made = judge(rollbacks=rollbacks)
    assert verdicts(made, [3.0] * 20) == [TAKE] * 20
    return made


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
def test_one_more_than_the_limit_in_a_row_stops(loss: float) -> None:
    assert verdicts(judge(), [2.0, loss, loss, loss]) == [TAKE, SKIP, SKIP, STOP]
    assert verdicts(judge(), [loss, loss, 2.0, loss, loss]) == [SKIP, SKIP, TAKE, SKIP, SKIP]
    assert verdicts(judge(skipped=0), [loss]) == [STOP]


def test_a_gradient_that_is_not_finite_counts_as_a_loss_that_is_not() -> None:
    found = judge()
    assert verdicts(found, [2.0, 2.0, 2.0], finite=False) == [SKIP, SKIP, STOP]
    assert (found.skipped, found.num_taken) == (3, 0)


def test_without_rollbacks_no_loss_is_a_spike() -> None:
    assert verdicts(settled(rollbacks=0), [30.0]) == [TAKE]


def test_a_spike_rolls_back_so_often_and_no_more() -> None:
    found = settled(rollbacks=2)
    assert found.mean == pytest.approx(3.0)
    assert verdicts(found, [3.9, 4.2, 3.0, 4.2, 3.0, 4.2]) == [
        *(TAKE, ROLL_BACK, TAKE, ROLL_BACK, TAKE, STOP)
    ]
    assert (found.skipped, found.rollbacks) == (3, 2)


def test_a_spike_before_the_mean_is_known_is_none() -> None:
    found = judge(rollbacks=1)
    assert verdicts(found, [3.0] * 19 + [30.0]) == [TAKE] * 20


def test_a_spike_without_a_checkpoint_is_skipped_up_to_the_limit() -> None:
    assert verdicts(settled(rollbacks=1), [9.0] * 3, back=False) == [SKIP, SKIP, STOP]


def test_numbers_that_stay_bad_roll_back_where_that_is_allowed() -> None:
    found = judge(rollbacks=1)
    assert verdicts(found, [NAN] * 6) == [SKIP, SKIP, ROLL_BACK, SKIP, SKIP, STOP]


def test_the_mean_follows_the_last_steps_and_no_spike() -> None:
    found = settled(rollbacks=1)
    verdicts(found, [2.0] * 400 + [9.0])
    assert found.mean == pytest.approx(2.0, abs=0.01)


@given(
    st.lists(st.sampled_from([2.0, 3.0, 9.0, NAN]), max_size=60),
    st.integers(0, 60),
    st.integers(0, 3),
)
def test_a_judge_that_takes_up_the_counts_of_another_goes_on_like_it(
    losses: list[float], cut: int, rollbacks: int
) -> None:
    whole, before, after = (judge(rollbacks=rollbacks) for _ in range(3))
    expected = verdicts(whole, losses)
    found = verdicts(before, losses[:cut])
    state: dict[str, Any] = json.loads(json.dumps(before.state_dict()))
    assert not state.keys() & set(LIMITS)
    after.load_state_dict(state)
    assert found + verdicts(after, losses[cut:]) == expected
    assert after.skipped == sum(verdict is not TAKE for verdict in expected)
