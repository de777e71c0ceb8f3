import functools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.benchmarks.allocate import (
    LAYERS,
    budget_of,
    by_milp,
    costs_of,
    damages_of,
    total,
    unlike,
)
from tuner.planning import knapsack
from tuner.planning.allocation import AllocationError, allocate

Costs = NDArray[np.int64]
Damages = NDArray[np.float64]


def sums(table: Costs | Damages) -> Damages:
    """Give the sum of every choice of one column per row, whole numbers up to 2**53 exactly."""
    return functools.reduce(
        lambda some, row: np.add.outer(some, row).ravel(), table.astype(np.float64)
    )


def by_brute_force(cost: Costs, damage: Damages, budget: int) -> tuple[float, float] | None:
    """Give damage and cost of the best answer, or None."""
    damages, costs = sums(damage), sums(cost)
    allowed = np.flatnonzero((costs <= budget) & (damages < math.inf))
    if not allowed.size:
        return None
    best = allowed[np.lexsort((costs[allowed], damages[allowed]))[0]]
    return float(damages[best]), float(costs[best])


def llama_tables(
    num_layers: int, hidden: int, intermediate: int, seed: int = 0
) -> tuple[Costs, Damages]:
    rng = np.random.default_rng(seed)
    roles = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    weights = np.exp(rng.uniform(-2, 2, len(roles)))
    levels = range(9)
    cost = [[4 * r * -(-c // 2**level) for level in levels] for r, c in roles]
    damage = np.outer(weights * [r * c for r, c in roles], [1 - 2.0**-level for level in levels])
    return np.array(cost * num_layers), np.tile(damage, (num_layers, 1))


@st.composite
def tables(draw: st.DrawFn, max_rows: int = 7) -> tuple[Costs, Damages, int]:
    """Draw small whole damages, so that ties abound and every sum is exact."""
    shape = draw(st.integers(1, max_rows)), draw(st.integers(1, 5))
    size = shape[0] * shape[1]
    high = draw(st.sampled_from([5, 1000, 10**12]))
    cost = draw(st.lists(st.integers(0, high), min_size=size, max_size=size))
    values = st.one_of(st.integers(-9, 9).map(float), st.just(math.inf))
    damage = np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(shape)
    damage[np.isinf(damage).all(axis=1), 0] = 1.0
    return np.array(cost).reshape(shape), damage, draw(st.integers(0, sum(cost)))


@given(tables())
def test_equals_brute_force_in_damage_and_then_in_cost(problem: tuple[Costs, Damages, int]) -> None:
    cost, damage, budget = problem
    best = by_brute_force(cost, damage, budget)
    if best is None:
        with pytest.raises(AllocationError):
            allocate(cost, damage, budget)
    else:
        columns = allocate(cost, damage, budget)
        assert (total(damage, columns), total(cost, columns)) == best


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force_where_damages_span_many_magnitudes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 10**9, (7, 5))
    damage = 10.0 ** rng.uniform(-9, 9, (7, 5))
    budget = int(cost.min(axis=1).sum() + rng.integers(0, 10**9))
    best = by_brute_force(cost, damage, budget)
    assert best is not None
    assert total(damage, allocate(cost, damage, budget)) == pytest.approx(best[0], rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_is_as_good_as_a_mixed_integer_solver(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.choice([4096, 11008, 5461], (int(rng.integers(20, 61)), 1))
    cost = size * 25600 >> np.arange(9)
    damage = size * np.exp(rng.normal(size=size.shape)) * np.sqrt(1 - 2.0 ** -np.arange(9))
    budget = int(cost[:, 0].sum() * rng.uniform(0.01, 0.9))
    columns = allocate(cost, damage, budget)
    theirs, is_proven = by_milp(cost, damage, budget)
    assert is_proven
    assert theirs is not None
    assert total(cost, columns) <= budget
    # The solver stops within its own tolerance, so ours may come out ahead.
    assert total(damage, columns) <= total(damage, theirs) * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("kind", ["knobs by role and depth", "drawn for each matrix and level"])
def test_equals_a_mixed_integer_solver_at_560_matrices_of_9_levels(kind: str, share: float) -> None:
    cost, damage = costs_of(LAYERS), damages_of(LAYERS)[kind]
    assert cost.shape == damage.shape == (560, 9)
    budget = budget_of(cost, share)
    columns = allocate(cost, damage, budget)  # would warn if it were not proven exact
    theirs, is_proven = by_milp(cost, damage, budget)
    assert is_proven
    assert theirs is not None
    assert total(cost, columns) <= budget
    assert total(damage, columns) <= total(damage, theirs) * (1 + 1e-9)
    # The solver's own tolerance on 560 damages that are at most 1 to it.
    assert total(damage, columns) == pytest.approx(total(damage, theirs), rel=1e-6)


@pytest.mark.parametrize("share", [0.37, 0.06])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_ties_between_560_matrices_of_which_no_two_are_alike_are_proven(
    seed: int, share: float
) -> None:
    cost, by_kind = unlike(560, seed)
    budget = budget_of(cost, share)
    for damage in by_kind.values():
        columns = allocate(cost, damage, budget)  # would warn if it were not proven exact
        assert budget - cost[:, 8].max() <= total(cost, columns) <= budget


@given(tables(), st.integers(0, 10**12))
def test_a_larger_budget_is_never_worse(problem: tuple[Costs, Damages, int], more: int) -> None:
    cost, damage, budget = problem
    try:
        columns = allocate(cost, damage, budget)
    except AllocationError:
        return
    assert total(damage, allocate(cost, damage, budget + more)) <= total(damage, columns)


@given(tables(max_rows=20))
def test_is_infeasible_exactly_below_the_minimum(problem: tuple[Costs, Damages, int]) -> None:
    cost, damage, _ = problem
    minimum = sum(np.where(np.isinf(damage), 10**15, cost).min(axis=1).tolist())
    assert total(cost, allocate(cost, damage, minimum)) == minimum
    with pytest.raises(AllocationError, match=f"{minimum - 1} bytes .* {minimum} bytes") as caught:
        allocate(cost, damage, minimum - 1)
    assert isinstance(caught.value, ValueError)
    assert caught.value.minimum_bytes == minimum
    assert caught.value.budget_bytes == minimum - 1
    assert "\n" not in str(caught.value)


def test_the_same_problem_has_the_same_answer() -> None:
    cost, damage = llama_tables(8, 512, 1376)
    budget = int(cost[:, 2].sum())
    assert allocate(cost, damage, budget) == allocate(cost.tolist(), damage.tolist(), budget)


def test_of_equal_columns_the_lower_one_is_chosen() -> None:
    assert allocate([[3, 2, 2, 5]], [[1.0, 1.0, 1.0, 1.0]], 9) == [1]


def test_identical_rows_take_their_columns_in_ascending_order() -> None:
    columns = allocate([[4, 2, 1]] * 30, [[0.0, 3.0, 5.0]] * 30, 71)
    assert columns == sorted(columns)
    assert len(set(columns)) > 1


def test_a_column_of_infinite_damage_is_never_chosen() -> None:
    assert allocate([[1, 2], [1, 2]], [[math.inf, 0.0], [5.0, math.inf]], 3) == [1, 0]
    with pytest.raises(AllocationError):
        allocate([[1, 2], [1, 2]], [[math.inf, 0.0], [5.0, math.inf]], 2)


def test_a_boundless_budget_buys_the_least_damage_everywhere() -> None:
    assert allocate([[2**40, 1]] * 3, [[0.0, 1.0]] * 3, 2**80) == [0, 0, 0]


@pytest.mark.parametrize(
    ("cost", "damage", "message"),
    [
        ([[1, 2], [3]], [[1.0, 2.0], [3.0]], "cost_bytes must be a table"),
        ([[1, 2], [3, 4]], [[1.0, 2.0], [3.0]], "damage must be a table"),
        ([], [], "cost_bytes must be a table"),
        ([[]], [[]], "cost_bytes must be a table"),
        ([1, 2], [1.0, 2.0], "cost_bytes must be a table"),
        ([["1"]], [[1.0]], "cost_bytes must be a table"),
        ([[1, 2]], [[1.0]], "one shape"),
        ([[1.5]], [[1.0]], "whole numbers"),
        ([[-1]], [[1.0]], "between 0 and"),
        ([[2**60]], [[1.0]], "between 0 and"),
        ([[1]], [[math.nan]], "must be finite"),
        ([[1]], [[-math.inf]], "must be finite"),
        ([[1], [1]], [[1.0], [math.inf]], "row 1 of damage is inf throughout"),
        ([[1, 2]], [[1e308, -1e308]], "rescale"),
    ],
)
def test_bad_tables_are_named(cost: object, damage: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        allocate(cost, damage, 10)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.7])
@pytest.mark.parametrize("are_alike", [True, False], ids=["alike", "unlike"])
def test_the_largest_llama_is_solved_within_its_budget(fraction: float, are_alike: bool) -> None:
    cost, damage = llama_tables(40, 5120, 13824)
    assert cost.shape == (280, 9)
    if not are_alike:
        damage = damage * np.random.default_rng(1).uniform(0.5, 2, (280, 1))
    low, high = cost[:, 8].sum(), cost[:, 0].sum()
    budget = int(low + fraction * (high - low))
    columns = allocate(cost, damage, budget)
    # Less than the smallest saving is left over.
    assert budget - cost[:, 8].max() <= total(cost, columns) <= budget


def test_a_search_too_wide_says_how_far_the_optimum_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_SEARCHES", ((4, 40),))
    rng = np.random.default_rng(0)
    cost = rng.integers(1, 10**8, (40, 9))
    with pytest.warns(RuntimeWarning, match="not proven exact"):
        columns = allocate(cost, -cost.astype(float), 10**9)
    assert total(cost, columns) <= 10**9


def test_allocation_needs_no_torch() -> None:
    code = "import sys, tuner.allocate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
