import pytest

from foam_lightning.errors import ConfigError
from tuner.trials.budget import MAX_FINALISTS, SMALLEST_SEARCH, SearchBudget, TuneOptions


def test_the_most_that_a_search_takes_is_every_run() -> None:
    search_budget = SearchBudget(num_trials=12, steps=150, num_seeds=2)
    assert search_budget.final_steps == 300
    assert search_budget.max_steps_total == 12 * 150 + 2 * MAX_FINALISTS * 300


@pytest.mark.parametrize("max_steps", [10_000, 210_000, 250_000, 400_000, 10**7])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5])
def test_a_search_stays_within_its_fraction_of_the_full_run(
    max_steps: int, fraction: float
) -> None:
    search_budget = SearchBudget.of(TuneOptions(fraction=fraction), max_steps)
    if fraction * max_steps < SMALLEST_SEARCH.max_steps_total:
        assert search_budget is None
    else:
        assert search_budget is not None
        assert (
            SMALLEST_SEARCH.max_steps_total <= search_budget.max_steps_total <= fraction * max_steps
        )


def test_more_time_is_a_longer_search() -> None:
    efforts = [SearchBudget.of(TuneOptions(fraction=n / 100), 200_000) for n in range(3, 100)]
    spent = [
        search_budget.max_steps_total for search_budget in efforts if search_budget is not None
    ]
    assert spent == sorted(spent)
    assert len(set(spent)) > 4


@pytest.mark.parametrize(
    ("options", "trials", "steps"),
    [
        (TuneOptions(trials=5), 5, 300),
        (TuneOptions(steps=20), 12, 20),
        (TuneOptions(fraction=1e-9, trials=3, steps=4), 3, 4),
    ],
)
def test_trials_and_steps_take_the_place_of_the_fraction(
    options: TuneOptions, trials: int, steps: int
) -> None:
    search_budget = SearchBudget.of(options, 10)
    assert search_budget is not None
    assert (search_budget.num_trials, search_budget.steps) == (trials, steps)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fraction": 0.0}, r"tune\.fraction must be above 0, got 0; \.02 is 2 %"),
        ({"fraction": float("nan")}, r"tune\.fraction must be above 0, got nan"),
        ({"trials": 0}, r"tune\.trials must be 1 or more, got 0"),
        ({"steps": -1}, r"tune\.steps must be 1 or more, got -1"),
    ],
)
def test_what_cannot_be_searched_with_is_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneOptions(**given)  # type: ignore[arg-type]
