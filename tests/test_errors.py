import pytest

from foam_lightning.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FoamError,
    InfeasibleBudgetError,
    PlanError,
)


def infeasible() -> InfeasibleBudgetError:
    breakdown = {"weights": 13 * 10**9, "optimizer_state": 1_500_000_000, "margin": 0}
    return InfeasibleBudgetError(8 * 10**9, 14_500_000_000, "optimizer_state", breakdown)


@pytest.mark.parametrize("error", [ConfigError, DataError, PlanError, CheckpointError])
def test_bad_usage_exits_with_2(error: type[FoamError]) -> None:
    assert issubclass(error, FoamError)
    assert error("no").exit_code == 2
    assert str(error("no")) == "no"


def test_an_infeasible_budget_exits_with_3() -> None:
    assert infeasible().exit_code == 3


def test_an_infeasible_budget_says_in_one_line_what_would_work() -> None:
    assert str(infeasible()) == (
        "a budget of 8GB is too small: with every memory option pulled this model needs 14.5GB "
        "(weights 13 GB, optimizer state 1.5 GB); the largest term is optimizer state; "
        "lower data.batch_size, choose a smaller model, or raise --memory-budget to at least 14.5GB"
    )


def test_an_infeasible_budget_carries_its_numbers() -> None:
    error = infeasible()
    assert (error.budget_bytes, error.minimum_bytes) == (8 * 10**9, 14_500_000_000)
    assert error.binding == "optimizer_state"
    assert error.breakdown["weights"] == 13 * 10**9
