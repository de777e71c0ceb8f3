from collections.abc import Callable
from dataclasses import replace

import pytest

from foam_lightning.errors import InfeasibleBudgetError
from foam_lightning.memory.options import MAX_LEVEL, OptionLadder
from foam_lightning.plan import FoldPlan
from tuner.planning.knobs import Knobs, state_bytes_table
from tuner.planning.planner import LEVELS, BudgetPlanner

Fit = Callable[[int], BudgetPlanner]
KNOBS = {
    "alike": Knobs(),
    "spread": Knobs(exponent=4.0),
    "one role": Knobs(exponent=2.0, q=8.0, k=8.0, down=0.2),
    "deep": Knobs(exponent=4.0, depth_slope=2.0),
    "capped": Knobs(exponent=4.0, level_cap=2),
}


@pytest.fixture(scope="module")
def span(fit: Fit) -> tuple[int, int]:
    """Give the smallest budget that works, and what Adam needs."""
    planner = fit(10**12)
    return (
        planner.minimum.account.peak_bytes,
        planner.accountant.account(planner.uniform(0)).peak_bytes,
    )


def budgets(span: tuple[int, int], count: int) -> list[int]:
    least, adam = span
    return [least + (adam - least) * i // (count - 1) for i in range(count)]


def peak(planner: BudgetPlanner, plan: FoldPlan) -> int:
    return planner.accountant.account(plan).peak_bytes


def with_levels(planner: BudgetPlanner, levels: dict[str, int]) -> FoldPlan:
    return replace(planner.uniform(0), levels=levels)


def test_every_plan_fits_whatever_the_budget(fit: Fit, span: tuple[int, int]) -> None:
    lowest = []
    for budget in budgets(span, 12):
        planner = fit(budget)
        assert planner.uniform_levels
        for level in planner.uniform_levels:
            assert peak(planner, planner.uniform(level)) <= budget
        plan = planner.default_plan()
        assert peak(planner, plan) <= budget
        planner.check(plan)
        assert planner.memory_options.batch_size == 4
        lowest.append(planner.uniform_levels[0])
    assert set(fit(span[1]).default_plan().levels.values()) == {0}
    assert lowest[-1] == 0


def test_the_minimum_works_and_one_byte_less_does_not(fit: Fit, span: tuple[int, int]) -> None:
    least, _ = span
    planner = fit(least)
    assert planner.uniform_levels[-1] == MAX_LEVEL
    assert peak(planner, planner.default_plan()) <= least
    with pytest.raises(InfeasibleBudgetError) as caught:
        _ = fit(least - 1).memory_options
    error = caught.value
    assert (error.budget_bytes, error.minimum_bytes) == (least - 1, least)
    assert sum(error.breakdown.values()) == least
    assert error.binding == max(error.breakdown, key=lambda term: error.breakdown[term])


def test_a_plan_over_the_budget_is_refused_with_what_it_needs(
    fit: Fit, span: tuple[int, int]
) -> None:
    planner = fit(span[1] - 1)
    plan = planner.job.plan_at(0)
    with pytest.raises(InfeasibleBudgetError) as caught:
        planner.check(plan)
    assert caught.value.minimum_bytes == peak(planner, plan)


@pytest.mark.parametrize("name", KNOBS)
def test_decoded_levels_fill_the_budget_and_never_exceed_it(
    fit: Fit, span: tuple[int, int], name: str
) -> None:
    for budget in budgets(span, 9):
        planner = fit(budget)
        levels = planner.levels_for(KNOBS[name], planner.max_state_bytes)
        slack = budget - peak(planner, with_levels(planner, levels))
        assert slack >= 0
        # What is left is not enough for any matrix to go down a level.
        for matrix, level in levels.items():
            if level > 0:
                lower = with_levels(planner, {**levels, matrix: level - 1})
                same_cost = planner.folded_state_bytes(lower) == planner.folded_state_bytes(
                    with_levels(planner, levels)
                )
                assert same_cost or peak(planner, lower) > budget


def test_a_cap_holds_where_the_budget_can_afford_it(fit: Fit, span: tuple[int, int]) -> None:
    least, adam = span
    rich, poor = fit((least + 3 * adam) // 4), fit(least)
    assert max(rich.levels_for(Knobs(level_cap=2), rich.max_state_bytes).values()) <= 2
    assert max(poor.levels_for(Knobs(level_cap=2), poor.max_state_bytes).values()) > 2


def test_fewer_bytes_may_be_asked_for(fit: Fit, span: tuple[int, int]) -> None:
    planner = fit(span[1])
    wanted = planner.folded_state_bytes(planner.uniform(3))
    levels = planner.levels_for(Knobs(exponent=4.0), wanted)
    found = planner.folded_state_bytes(with_levels(planner, levels))
    assert 0.98 * wanted < found <= wanted


def test_a_tight_budget_pulls_levers(fit: Fit, span: tuple[int, int]) -> None:
    job = fit(span[1]).job
    assert fit(span[1]).memory_options == job.memory_options
    least = fit(span[0])
    assert least.memory_options != job.memory_options
    assert peak(least, least.uniform(MAX_LEVEL)) <= span[0]


def test_the_table_of_the_allocation_is_what_the_account_counts(fit: Fit) -> None:
    planner = fit(10**12)
    table = state_bytes_table(planner.module.foldable, LEVELS, "float32")
    for level in LEVELS:
        assert int(table[:, level].sum()) == planner.folded_state_bytes(planner.uniform(level))


def test_state_in_host_memory_is_kept_at_level_2_before_any_run(
    fit: Fit, span: tuple[int, int]
) -> None:
    planner = fit(span[1])
    planner.ladder = OptionLadder(replace(planner.job.memory_options, state_offload=True))
    assert planner.memory_options.state_offload
    assert set(planner.default_plan().levels.values()) == {2}
    # Levels take nothing from the device, so that a search may go down to Adam.
    assert planner.uniform_levels == list(LEVELS)
    levels = planner.levels_for(Knobs(exponent=4.0), planner.max_state_bytes)
    assert set(levels.values()) == {0}
    account = planner.accountant.account(planner.default_plan())
    assert account.breakdown["optimizer_state"] == 0
    assert account.peak_bytes < peak(fit(span[1]), fit(span[1]).uniform(MAX_LEVEL))
