from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foam_lightning.errors import ConfigError, InfeasibleBudgetError
from foam_lightning.job import Job
from foam_lightning.memory.options import MAX_LEVEL
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.storage.run_identity import RunIdentity
from foam_lightning.training import train
from tests.support.budgets import smallest_with_state_on_device
from tests.support.tiny import REPOSITORY
from tuner.config.parser import parse
from tuner.planning.knobs import Knobs, state_bytes_table
from tuner.planning.levels import LEVELS
from tuner.planning.planner import BudgetPlanner, mean_level, nearby_budgets
from tuner.rehearsal import rehearse
from tuner.run_context import RunContext
from tuner.trials.budget import TuneOptions

Fit = Callable[[int | None], BudgetPlanner]
KNOBS = {
    "alike": Knobs(),
    "spread": Knobs(exponent=4.0),
    "one role": Knobs(exponent=2.0, q=8.0, k=8.0, down=0.2),
    "deep": Knobs(exponent=4.0, depth_slope=2.0),
    "capped": Knobs(exponent=4.0, level_cap=2),
}


def span_of(planner: BudgetPlanner) -> tuple[int, int]:
    """Give the smallest budget that works, and what Adam needs."""
    return planner.minimum.account.peak_bytes, peak(planner, planner.uniform(0))


def spread(span: tuple[int, int], count: int) -> list[int]:
    low, high = span
    return [low + (high - low) * i // (count - 1) for i in range(count)]


def peak(planner: BudgetPlanner, plan: FoldPlan) -> int:
    return planner.accountant.account(plan).peak_bytes


def with_levels(planner: BudgetPlanner, levels: dict[str, int]) -> FoldPlan:
    return replace(planner.uniform(0), levels=levels)


@pytest.fixture(scope="module")
def span(fit: Fit) -> tuple[int, int]:
    return span_of(fit(None))


def test_every_plan_fits_whatever_the_budget(fit: Fit, span: tuple[int, int]) -> None:
    for budget in spread(span, 12):
        planner = fit(budget)
        assert planner.uniform_levels
        for level in planner.uniform_levels:
            assert peak(planner, planner.uniform(level)) <= budget
        plan = planner.default_plan()
        assert peak(planner, plan) <= budget
        planner.check(plan)
        assert planner.memory_options.batch_size == 4
    assert planner.adam_may_win
    assert set(plan.levels.values()) == {0}
    assert planner.memory_options == planner.job.memory_options


# ---- the default model, run at ten budgets


@pytest.fixture(scope="module")
def roomy() -> BudgetPlanner:
    words = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--data.validation_sequences=8"]
    words += ["--trainer.enable_progress_bar=false"]
    default = REPOSITORY / "configs" / "default.yaml"
    return BudgetPlanner(parse("fit", words, default=default).job(), None)


@pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
@pytest.mark.parametrize("tenth", range(10))
def test_a_run_of_the_default_model_stays_within_its_budget(
    roomy: BudgetPlanner, tenth: int, tmp_path: Path
) -> None:
    budget = spread(span_of(roomy), 10)[tenth]
    planner = roomy.with_budget(budget)
    plan = planner.default_plan()
    predicted = peak(planner, plan)
    assert predicted <= budget
    folder = RunFolder.open(tmp_path, "run", RunIdentity())
    folder.tuning.mkdir()
    context = RunContext(
        job=planner.job, planner=planner, folder=folder, tune_options=TuneOptions()
    )
    rehearsal = rehearse(context, plan)
    trained = train(planner.job, plan, folder, predicted_bytes=predicted, budget_bytes=budget)
    for measured in (rehearsal.measured_peak_bytes, trained.measured_peak_bytes):
        assert measured is not None
        assert 0.9999 * predicted <= measured <= predicted


# ---- too small


def test_the_minimum_works_and_one_byte_less_does_not(fit: Fit, span: tuple[int, int]) -> None:
    smallest, _ = span
    planner = fit(smallest)
    planner.check_feasible()
    assert planner.uniform_levels[-1] == MAX_LEVEL
    assert planner.memory_options != planner.job.memory_options
    assert peak(planner, planner.default_plan()) <= smallest
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(smallest - 1).check_feasible()
    error = caught.value
    assert (error.budget_bytes, error.minimum_bytes) == (smallest - 1, smallest)
    assert sum(error.breakdown.values()) == smallest
    assert error.binding == max(error.breakdown, key=lambda term: error.breakdown[term])
    with pytest.raises(InfeasibleBudgetError):
        fit(smallest - 1).default_plan()


def test_a_plan_over_the_budget_is_refused_with_what_it_needs(
    fit: Fit, span: tuple[int, int]
) -> None:
    planner = fit(span[1] - 1)
    plan = planner.job.uniform_plan(0)
    with pytest.raises(InfeasibleBudgetError) as caught:
        planner.check(plan)
    assert caught.value.minimum_bytes == peak(planner, plan)
    fit(None).check(plan)


def test_without_a_budget_everything_fits(fit: Fit) -> None:
    planner = fit(None)
    assert planner.uniform_levels == list(LEVELS)
    assert planner.memory_options == planner.job.memory_options
    assert planner.max_state_bytes == planner.folded_state_bytes(planner.uniform(0))
    assert set(planner.levels_for(Knobs(), planner.max_state_bytes).values()) == {0}
    assert nearby_budgets(planner) == []


# ---- levels


@pytest.mark.parametrize("name", KNOBS)
def test_levels_fill_the_budget_and_never_exceed_it(
    fit: Fit, span: tuple[int, int], name: str
) -> None:
    for budget in spread(span, 9):
        planner = fit(budget)
        levels = planner.levels_for(KNOBS[name], planner.max_state_bytes)
        plan = with_levels(planner, levels)
        unused = planner.max_state_bytes - planner.folded_state_bytes(plan)
        assert 0 <= unused < 0.01 * planner.max_state_bytes
        assert peak(planner, plan) <= budget


def test_a_level_cap_holds_where_the_budget_allows_it(fit: Fit, span: tuple[int, int]) -> None:
    low, high = span
    large, planner = fit((low + 3 * high) // 4), fit(None)
    small = fit(smallest_with_state_on_device(planner))
    assert max(large.levels_for(Knobs(level_cap=2), large.max_state_bytes).values()) <= 2
    assert max(small.levels_for(Knobs(level_cap=2), small.max_state_bytes).values()) > 2


def test_levels_for_fewer_bytes_than_the_budget_leaves(fit: Fit, span: tuple[int, int]) -> None:
    planner = fit(span[1])
    wanted = planner.folded_state_bytes(planner.uniform(3))
    levels = planner.levels_for(Knobs(exponent=4.0), wanted)
    found = planner.folded_state_bytes(with_levels(planner, levels))
    assert 0.98 * wanted < found <= wanted


def test_the_costs_of_the_allocation_are_those_of_the_account(fit: Fit) -> None:
    planner = fit(None)
    table = state_bytes_table(planner.module.foldable, LEVELS, "float32")
    for level in LEVELS:
        assert int(table[:, level].sum()) == planner.folded_state_bytes(planner.uniform(level))


def test_state_in_host_memory_is_at_level_2_before_any_trial(
    fit: Fit, span: tuple[int, int]
) -> None:
    job = fit(None).job
    planner = BudgetPlanner(replace(job, model=replace(job.model, state_offload=True)), span[1])
    assert planner.memory_options.state_offload
    assert set(planner.default_plan().levels.values()) == {2}
    # Levels save nothing on the device, so that a search may go down to Adam.
    assert planner.uniform_levels == list(LEVELS)
    levels = planner.levels_for(Knobs(exponent=4.0), planner.max_state_bytes)
    assert set(levels.values()) == {0}
    account = planner.accountant.account(planner.default_plan())
    assert account.breakdown["optimizer_state"] == 0
    assert account.peak_bytes < peak(fit(span[1]), fit(span[1]).uniform(MAX_LEVEL))


# ---- nearby budgets


def test_nearby_budgets_have_the_plans_of_their_own(fit: Fit, span: tuple[int, int]) -> None:
    budget = span[0] * 100 // 85
    larger, smaller = nearby_budgets(fit(budget))
    assert (larger.percent, smaller.percent) == (10, -10)
    assert (larger.budget_bytes, smaller.budget_bytes) == (budget * 110 // 100, budget * 90 // 100)
    for found in (larger, smaller):
        own = fit(found.budget_bytes)
        assert found.plan == own.default_plan()
        assert found.peak_bytes == peak(own, found.plan) <= found.budget_bytes


@pytest.mark.parametrize(("percent", "fits"), [(100, [True, False]), (95, [True, False]), (1, [])])
def test_a_nearby_budget_below_the_minimum_has_no_plan(
    fit: Fit, span: tuple[int, int], percent: int, fits: list[bool]
) -> None:
    found = nearby_budgets(fit(span[0] * percent // 100))
    assert [each.plan is not None for each in found] == (fits or [False, False])


def test_a_nearby_budget_whose_options_the_settings_contradict_has_no_plan(
    fit: Fit, span: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("gradient release keeps no gradients to clip")

    monkeypatch.setattr(Job, "check_memory_options", refuse)
    assert [each.plan for each in nearby_budgets(fit(2 * span[1]))] == [None, None]


def test_the_mean_level_is_over_the_matrices_that_fold(job: Job) -> None:
    plan = job.uniform_plan(3)
    assert mean_level(plan) == 3
    mixed = replace(plan, levels={**plan.levels, next(iter(plan.levels)): 0})
    assert mean_level(mixed) == pytest.approx(3 - 3 / len(plan.levels))
    assert mean_level(replace(plan, levels={})) == 0
