import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from foam_lightning.job import Job
from foam_lightning.plan import MemoryOptions
from tests.search_results import (
    ADAM_WINS,
    ALL_DIVERGED,
    HIGHER,
    MIXED,
    NO_REFERENCE,
    REFERENCE,
    TUNED,
    UNIFORM,
    candidate,
    outcome_of,
    uniform_plan,
)
from tuner.planning.planner import BudgetPlanner
from tuner.report.verdict import AdamRequirement, adam_requirement, verdict
from tuner.trials.extrapolation import predict_full_run
from tuner.trials.results import SearchResult

SAME = AdamRequirement(MIXED.plan.memory_options)
FINAL = 320


def said(search_result: SearchResult, need: AdamRequirement = SAME, full_steps: int = FINAL) -> str:
    return verdict(search_result, need, full_steps)


def test_a_mixed_plan_is_judged_against_adam_and_against_uniform_at_equal_bytes() -> None:
    assert said(TUNED) == (
        "In runs of 320 steps, at 25 % of Adam's state of the matrices (3.072 MB saved), mixed "
        "levels 1-4 loses 0.1000 +- 0.0139 less than split-lr Adam and 0.0400 +- 0.0139 less than "
        "uniform level 2 at equal bytes, in nats per token with 95 % intervals. Adam fits the "
        "budget with the same memory options, so what is saved stays free."
    )


@pytest.mark.parametrize(
    ("adam", "uniform", "expected"),
    [
        (3.385, 3.42, "cannot be told from split-lr Adam (-0.0050 +- 0.0139) and loses 0.0400"),
        (3.35, 3.385, "loses 0.0300 +- 0.0139 more than split-lr Adam and cannot be told from"),
        (3.43, 3.35, "less than split-lr Adam and 0.0300 +- 0.0139 more than uniform level 2 at"),
    ],
)
def test_nothing_is_claimed_that_is_undecided(adam: float, uniform: float, expected: str) -> None:
    search_result = outcome_of(
        MIXED,
        candidate("reference", "split-lr Adam", uniform_plan(0), 1, adam, adam),
        candidate("uniform", "uniform level 2", uniform_plan(2), 1 / 4, uniform, uniform),
        trials=[],
    )
    assert expected in said(search_result)


def test_a_uniform_plan_is_judged_against_the_mixed_one_at_its_bytes() -> None:
    text = said(outcome_of(UNIFORM, REFERENCE, HIGHER, MIXED, trials=[]))
    assert (
        "less than split-lr Adam and 0.0400 +- 0.0139 more than mixed levels 1-4 at equal" in text
    )
    assert "level 3" not in text


def test_only_plans_at_equal_bytes_are_named_as_such() -> None:
    text = said(outcome_of(MIXED, REFERENCE, HIGHER, trials=[]))
    assert "equal bytes" not in text
    assert "mixed levels 1-4 loses 0.1000 +- 0.0139 less than split-lr Adam, in nats" in text


def test_adam_that_stays_is_beside_the_plan_of_least_state_that_ties_with_it() -> None:
    tie = candidate("uniform", "uniform level 3", uniform_plan(3), 1 / 8, 3.485, 3.485)
    more = candidate("uniform", "uniform level 2", uniform_plan(2), 1 / 4, 3.48, 3.48)
    text = said(outcome_of(REFERENCE, more, tie, trials=[]))
    assert text.startswith(
        "split-lr Adam stays: it fits, and in runs of 320 steps nothing with less"
    )
    assert (
        "at 12.5 % of Adam's state of the matrices, uniform level 3 cannot be told from it" in text
    )
    worse = candidate("uniform", "uniform level 2", uniform_plan(2), 1 / 4, 3.6, 3.6)
    assert "uniform level 2 loses 0.1200 +- 0.0139 more than it" in said(
        outcome_of(REFERENCE, worse, trials=[])
    )
    assert "saved" not in said(ADAM_WINS)


def test_it_says_when_there_is_no_adam_to_compare_with() -> None:
    text = said(NO_REFERENCE, AdamRequirement(None, 40_000_001))
    assert "uniform level 2 was not compared with Adam, of which no run came to its end." in text
    assert (
        "Adam does not fit the budget, whatever the memory options: it takes 40.01MB or more."
        in text
    )


def test_without_adam_what_else_there_is_is_compared() -> None:
    text = said(outcome_of(MIXED, UNIFORM, trials=[]))
    assert "no run came to its end; it loses 0.0400 +- 0.0139 less than uniform level 2" in text


def test_it_says_what_adam_would_have_to_pull() -> None:
    dear = MemoryOptions(
        micro_batch_size=1, accumulate_grad_batches=8, activation_checkpointing=True
    )
    assert said(TUNED, AdamRequirement(dear)).endswith(
        "Adam would fit the budget only with micro-batch 1 x 8 accumulated, chunked loss off, "
        "activation checkpointing on."
    )


def test_a_plan_found_on_a_twin_says_so() -> None:
    winner = replace(MIXED, plan=replace(MIXED.plan, proxy_model={"hidden_size": 64}))
    text = said(outcome_of(winner, REFERENCE, trials=[]))
    assert text.startswith(
        "On a proxy model of hidden 64, in runs of 320 steps, at 25 % of Adam's state"
    )


def test_a_longer_full_run_is_warned_of() -> None:
    assert "expect" not in said(TUNED, full_steps=FINAL)
    text = said(TUNED, full_steps=5 * FINAL)
    predict = partial(predict_full_run, num_steps=FINAL, full_steps=5 * FINAL)
    gaps = [predict(MIXED.against(c), c is REFERENCE) for c in (REFERENCE, UNIFORM)]
    assert (
        f"On the full run, 5 times as long, expect {gaps[0]} against split-lr Adam and {gaps[1]} "
        "against uniform level 2 at equal bytes"
    ) in text
    assert "expect" not in said(ADAM_WINS, full_steps=5 * FINAL)  # there is no gap


def test_where_all_diverged_nothing_was_found() -> None:
    assert math.isnan(ALL_DIVERGED.winner.loss)
    assert said(ALL_DIVERGED) == (
        "Every run of the finals diverged, so nothing was found; lower model.lr."
    )


def test_what_adam_needs_is_what_it_fits_with(new_job: Callable[..., Job]) -> None:
    job = new_job(
        model={"hidden_size": 96, "intermediate_size": 172, "num_hidden_layers": 4},
        data={"batch_size": 4},
    )
    roomy = BudgetPlanner(job, 10**12)
    assert adam_requirement(roomy) == AdamRequirement(roomy.memory_options)
    least = roomy.least(0).account.peak_bytes

    tight = roomy.with_budget(least)
    need = adam_requirement(tight)
    assert need.memory_options is not None
    assert need.memory_options != tight.memory_options  # level 2 fits with cheaper ones
    assert tight.fits(tight.module.uniform_plan(0, need.memory_options))

    assert adam_requirement(roomy.with_budget(least - 1)) == AdamRequirement(None, least)
