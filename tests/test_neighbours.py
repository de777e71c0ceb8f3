from collections.abc import Callable
from dataclasses import replace

import pytest

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from tuner.planning.planner import BudgetPlanner, mean_level, nearby_budgets


def test_neighbours_are_the_plans_of_their_budgets(fit: Callable[[int], BudgetPlanner]) -> None:
    budget = fit(1).minimum.account.peak_bytes * 100 // 85
    more, less = nearby_budgets(fit(budget))
    assert (more.percent, less.percent) == (10, -10)
    assert (more.budget_bytes, less.budget_bytes) == (budget * 110 // 100, budget * 90 // 100)
    for found in (more, less):
        own = fit(found.budget_bytes)
        assert found.plan == own.default_plan()
        assert found.peak_bytes == own.accountant.account(found.plan).peak_bytes
        assert found.peak_bytes <= found.budget_bytes


def test_a_budget_that_nothing_fits_has_no_plan(fit: Callable[[int], BudgetPlanner]) -> None:
    least = fit(1).minimum.account.peak_bytes
    for budget, fits in (
        (least, [True, False]),
        (least * 95 // 100, [True, False]),
        (1, [False] * 2),
    ):
        assert [found.plan is not None for found in nearby_budgets(fit(budget))] == fits


def test_levers_that_the_settings_contradict_are_no_plan(
    fit: Callable[[int], BudgetPlanner], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: BudgetPlanner) -> FoldPlan:
        raise ConfigError("gradient release keeps no gradients to clip")

    monkeypatch.setattr(BudgetPlanner, "default_plan", refuse)
    assert [found.plan for found in nearby_budgets(fit(10**12))] == [None, None]


def test_the_mean_level_is_over_the_matrices_that_fold(job: Job) -> None:
    plan = job.plan_at(3)
    assert mean_level(plan) == 3
    first = next(iter(plan.levels))
    mixed = replace(plan, levels={**plan.levels, first: 0})
    assert mean_level(mixed) == pytest.approx(3 - 3 / len(plan.levels))
    assert mean_level(replace(plan, levels={})) == 0
