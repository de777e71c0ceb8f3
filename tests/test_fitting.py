from collections.abc import Callable
from dataclasses import replace

import pytest

from foam_lightning.errors import InfeasibleBudgetError
from foam_lightning.memory.options import MAX_LEVEL, Ladder
from foam_lightning.plan import FoldPlan
from tuner.planning.knobs import Knobs, state_bytes_table
from tuner.planning.planner import LEVELS, Fitting

Fit = Callable[[int], Fitting]
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
    fitting = fit(10**12)
    return (
        fitting.minimum.account.peak_bytes,
        fitting.accountant.account(fitting.uniform(0)).peak_bytes,
    )


def budgets(span: tuple[int, int], count: int) -> list[int]:
    least, adam = span
    return [least + (adam - least) * i // (count - 1) for i in range(count)]


def peak(fitting: Fitting, plan: FoldPlan) -> int:
    return fitting.accountant.account(plan).peak_bytes


def with_levels(fitting: Fitting, levels: dict[str, int]) -> FoldPlan:
    return replace(fitting.uniform(0), levels=levels)


def test_every_plan_fits_whatever_the_budget(fit: Fit, span: tuple[int, int]) -> None:
    lowest = []
    for budget in budgets(span, 12):
        fitting = fit(budget)
        assert fitting.uniform_levels
        for level in fitting.uniform_levels:
            assert peak(fitting, fitting.uniform(level)) <= budget
        plan = fitting.untuned()
        assert peak(fitting, plan) <= budget
        fitting.check(plan)
        assert fitting.levers.batch_size == 4
        lowest.append(fitting.uniform_levels[0])
    assert set(fit(span[1]).untuned().levels.values()) == {0}
    assert lowest[-1] == 0


def test_the_minimum_works_and_one_byte_less_does_not(fit: Fit, span: tuple[int, int]) -> None:
    least, _ = span
    fitting = fit(least)
    assert fitting.uniform_levels[-1] == MAX_LEVEL
    assert peak(fitting, fitting.untuned()) <= least
    with pytest.raises(InfeasibleBudgetError) as caught:
        _ = fit(least - 1).levers
    error = caught.value
    assert (error.budget_bytes, error.minimum_bytes) == (least - 1, least)
    assert sum(error.breakdown.values()) == least
    assert error.binding == max(error.breakdown, key=lambda term: error.breakdown[term])


def test_a_plan_over_the_budget_is_refused_with_what_it_needs(
    fit: Fit, span: tuple[int, int]
) -> None:
    fitting = fit(span[1] - 1)
    plan = fitting.job.plan_at(0)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fitting.check(plan)
    assert caught.value.minimum_bytes == peak(fitting, plan)


@pytest.mark.parametrize("name", KNOBS)
def test_decoded_levels_fill_the_budget_and_never_exceed_it(
    fit: Fit, span: tuple[int, int], name: str
) -> None:
    for budget in budgets(span, 9):
        fitting = fit(budget)
        levels = fitting.decoded(KNOBS[name], fitting.state_allowance)
        slack = budget - peak(fitting, with_levels(fitting, levels))
        assert slack >= 0
        # What is left is not enough for any matrix to go down a level.
        for matrix, level in levels.items():
            if level > 0:
                lower = with_levels(fitting, {**levels, matrix: level - 1})
                same_cost = fitting.folded_bytes(lower) == fitting.folded_bytes(
                    with_levels(fitting, levels)
                )
                assert same_cost or peak(fitting, lower) > budget


def test_a_cap_holds_where_the_budget_can_afford_it(fit: Fit, span: tuple[int, int]) -> None:
    least, adam = span
    rich, poor = fit((least + 3 * adam) // 4), fit(least)
    assert max(rich.decoded(Knobs(level_cap=2), rich.state_allowance).values()) <= 2
    assert max(poor.decoded(Knobs(level_cap=2), poor.state_allowance).values()) > 2


def test_fewer_bytes_may_be_asked_for(fit: Fit, span: tuple[int, int]) -> None:
    fitting = fit(span[1])
    wanted = fitting.folded_bytes(fitting.uniform(3))
    levels = fitting.decoded(Knobs(exponent=4.0), wanted)
    found = fitting.folded_bytes(with_levels(fitting, levels))
    assert 0.98 * wanted < found <= wanted


def test_a_tight_budget_pulls_levers(fit: Fit, span: tuple[int, int]) -> None:
    job = fit(span[1]).job
    assert fit(span[1]).levers == job.levers
    least = fit(span[0])
    assert least.levers != job.levers
    assert peak(least, least.uniform(MAX_LEVEL)) <= span[0]


def test_the_table_of_the_allocation_is_what_the_account_counts(fit: Fit) -> None:
    fitting = fit(10**12)
    table = state_bytes_table(fitting.module.foldable, LEVELS, "float32")
    for level in LEVELS:
        assert int(table[:, level].sum()) == fitting.folded_bytes(fitting.uniform(level))


def test_state_in_host_memory_is_kept_at_level_2_before_any_run(
    fit: Fit, span: tuple[int, int]
) -> None:
    fitting = fit(span[1])
    fitting.ladder = Ladder(replace(fitting.job.levers, state_offload=True))
    assert fitting.levers.state_offload
    assert set(fitting.untuned().levels.values()) == {2}
    # Levels take nothing from the device, so that a search may go down to Adam.
    assert fitting.uniform_levels == list(LEVELS)
    levels = fitting.decoded(Knobs(exponent=4.0), fitting.state_allowance)
    assert set(levels.values()) == {0}
    account = fitting.accountant.account(fitting.untuned())
    assert account.breakdown["optimizer_state"] == 0
    assert account.peak_bytes < peak(fit(span[1]), fit(span[1]).uniform(MAX_LEVEL))
