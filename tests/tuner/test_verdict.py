from collections.abc import Callable
from functools import partial

import pytest

from foam_lightning.job import Job
from foam_lightning.plan import MemoryOptions
from tests.support.search_results import (
    ADAM_WINS,
    ALL_DIVERGED,
    HIGHER,
    MIXED,
    NO_REFERENCE,
    REFERENCE,
    TUNED,
    UNIFORM,
    candidate,
    search_result_of,
    uniform_plan,
)
from tuner.planning.planner import BudgetPlanner
from tuner.report.verdict import AdamRequirement, adam_requirement, verdict
from tuner.trials.extrapolation import predict_full_run
from tuner.trials.results import Candidate, SearchResult

SAME = AdamRequirement(MIXED.plan.memory_options)
FINAL = 320


def said(search_result: SearchResult, adam: AdamRequirement = SAME, full_steps: int = FINAL) -> str:
    return verdict(search_result, adam, full_steps)


def adam(loss: float) -> Candidate:
    return candidate("reference", "split-lr Adam", uniform_plan(0), 1, loss, loss)


def uniform(level: int, loss: float) -> Candidate:
    plan = uniform_plan(level)
    return candidate("uniform", f"uniform level {level}", plan, 2.0**-level, loss, loss)


def test_a_mixed_plan_is_compared_with_adam_and_with_uniform_at_equal_bytes() -> None:
    loss, plan, memory = said(TUNED).splitlines()
    assert "0.100 ± 0.014 nats lower than Adam (split learning rate)" in loss
    assert "0.040 ± 0.014 nats lower than uniform level 2 at equal bytes" in loss
    assert "95 %" in loss
    assert f"{FINAL} steps" in loss
    assert "mixed levels 1-4" in plan
    assert "25 %" in plan
    assert "3.072 MB" in plan
    assert "unused" in memory


@pytest.mark.parametrize(
    ("of_adam", "of_uniform", "to_adam", "to_uniform"),
    [
        (3.385, 3.42, "no significant difference", "lower"),
        (3.35, 3.385, "higher", "no significant difference"),
        (3.43, 3.35, "lower", "higher"),
    ],
)
def test_only_significant_differences_are_claimed(
    of_adam: float, of_uniform: float, to_adam: str, to_uniform: str
) -> None:
    loss, *_ = said(search_result_of(MIXED, adam(of_adam), uniform(2, of_uniform))).split("\n")
    first, second = loss.split(" and ")
    assert to_adam in first
    assert to_uniform in second


def test_a_uniform_plan_is_compared_with_the_mixed_one_at_its_bytes() -> None:
    text = said(search_result_of(UNIFORM, REFERENCE, HIGHER, MIXED))
    assert "0.040 ± 0.014 nats higher than mixed levels 1-4 at equal bytes" in text
    assert "level 3" not in text


@pytest.mark.parametrize(
    ("folded", "difference"),
    [
        ([uniform(2, 3.48), uniform(3, 3.485)], "no significant difference"),
        ([uniform(3, 3.6)], "0.120 ± 0.014 nats higher"),
    ],
)
def test_where_adam_wins_the_smallest_tied_plan_is_named(
    folded: list[Candidate], difference: str
) -> None:
    plan, closest = said(search_result_of(REFERENCE, *folded)).splitlines()
    assert plan.startswith("Plan: Adam")
    assert "uniform level 3" in closest
    assert "12.5 %" in closest
    assert difference in closest


def test_where_no_adam_finished_the_plan_is_compared_with_the_others() -> None:
    text = said(NO_REFERENCE, AdamRequirement(None, 40_000_001))
    assert "Not compared with Adam" in text
    assert "40.01MB" in text
    text = said(search_result_of(MIXED, UNIFORM))
    assert "Not compared with Adam" in text
    assert "0.040 ± 0.014 nats lower than uniform level 2" in text


def test_memory_options_that_adam_would_need_are_named() -> None:
    options = MemoryOptions(
        micro_batch_size=1, accumulate_grad_batches=8, activation_checkpointing=True
    )
    last = said(TUNED, AdamRequirement(options)).splitlines()[-1]
    for words in ("8 micro-batches of 1", "chunked loss off", "activation checkpointing on"):
        assert words in last
    assert "gradient release" not in last


def test_a_longer_full_run_gets_a_prediction() -> None:
    assert "Expected" not in said(TUNED)
    last = said(TUNED, full_steps=5 * FINAL).splitlines()[-1]
    predict = partial(predict_full_run, num_steps=FINAL, full_steps=5 * FINAL)
    assert "5 times as long" in last
    assert predict(MIXED.against(REFERENCE), True).size in last
    assert str(predict(MIXED.against(UNIFORM), False)) in last  # not significant any more
    assert "Expected" not in said(ADAM_WINS, full_steps=5 * FINAL)


def test_if_all_finals_diverged_it_says_which_setting_to_change() -> None:
    text = said(ALL_DIVERGED)
    assert "diverged" in text
    assert "model.lr" in text


def test_what_adam_needs_is_what_it_fits_with(new_job: Callable[..., Job]) -> None:
    job = new_job(
        model={"hidden_size": 96, "intermediate_size": 172, "num_hidden_layers": 4},
        data={"batch_size": 4},
    )
    roomy = BudgetPlanner(job, 10**12)
    assert adam_requirement(roomy) == AdamRequirement(roomy.memory_options)
    least = roomy.minimum_at(0).account.peak_bytes

    tight = roomy.with_budget(least)
    need = adam_requirement(tight)
    assert need.memory_options is not None
    assert need.memory_options != tight.memory_options  # level 2 fits with cheaper ones
    assert tight.fits(tight.module.uniform_plan(0, need.memory_options))

    assert adam_requirement(roomy.with_budget(least - 1)) == AdamRequirement(None, least)
