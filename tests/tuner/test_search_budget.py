import pytest

from tuner.trials.budget import MAX_FINALISTS, SMALLEST_SEARCH, SearchBudget, TuneOptions


def test_the_largest_number_of_steps_counts_every_run() -> None:
    budget = SearchBudget(num_trials=12, steps=150, num_seeds=2)
    assert budget.final_steps == 300
    assert budget.max_steps_total == 12 * 150 + 2 * MAX_FINALISTS * 300


@pytest.mark.parametrize("max_steps", [10_000, 210_000, 250_000, 400_000, 10**7])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5])
def test_a_search_stays_within_its_fraction_of_the_full_run(
    max_steps: int, fraction: float
) -> None:
    budget = SearchBudget.from_options(TuneOptions(fraction=fraction), max_steps)
    smallest, allowed = SMALLEST_SEARCH.max_steps_total, fraction * max_steps
    if allowed < smallest:
        assert budget is None
    else:
        assert budget is not None
        assert smallest <= budget.max_steps_total <= allowed


def test_a_larger_fraction_is_a_longer_search() -> None:
    options = [TuneOptions(fraction=n / 100) for n in range(3, 100)]
    budgets = [SearchBudget.from_options(each, 200_000) for each in options]
    steps = [budget.max_steps_total for budget in budgets if budget is not None]
    assert steps == sorted(steps)
    assert len(set(steps)) > 4


@pytest.mark.parametrize(
    ("options", "trials", "steps"),
    [
        (TuneOptions(trials=5), 5, 300),
        (TuneOptions(steps=20), 12, 20),
        (TuneOptions(fraction=1e-9, trials=3, steps=4), 3, 4),
    ],
)
def test_trials_and_steps_replace_the_fraction(
    options: TuneOptions, trials: int, steps: int
) -> None:
    assert SearchBudget.from_options(options, 10) == SearchBudget(trials, steps, 2)
