"""The allocation against brute force on small tables, and a bound on large ones."""

import ctypes
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog  # type: ignore[import-untyped]
from scipy.sparse import eye_array, kron  # type: ignore[import-untyped]

from tuner.planning.allocation import allocate
from tuner.planning.knobs import Knobs, damage_table, state_bytes_table

Costs = NDArray[np.int64]
Damages = NDArray[np.float64]
LEVELS = range(9)
KNOBS = Knobs(exponent=4.0, q=4.0, k=4.0, v=0.5, down=2.0)


def total(table: NDArray[np.generic], columns: list[int]) -> float:
    return math.fsum(float(row[column]) for row, column in zip(table, columns, strict=True))


def sums(table: Costs | Damages) -> Damages:
    """Sum every choice of one column per row; whole numbers up to 2**53 exactly."""
    return functools.reduce(lambda some, row: np.add.outer(some, row).ravel(), table.astype(float))


def least_damage(cost: Costs, damage: Damages, budget: int) -> float | None:
    """Find the least damage by brute force; None where nothing fits."""
    allowed = (sums(cost) <= budget) & np.isfinite(sums(damage))
    return float(sums(damage)[allowed].min()) if allowed.any() else None


def lower_bound(cost: Costs, damage: Damages, budget: int) -> float:
    """Bound the damage of every answer by that of fractions of columns."""
    rows, columns = cost.shape
    one_each = kron(eye_array(rows), np.ones((1, columns)))
    solved = linprog(
        damage.ravel() / damage.max(),
        A_ub=cost.reshape(1, -1) / budget,
        b_ub=[1],
        A_eq=one_each,
        b_eq=np.ones(rows),
    )
    return float(solved.fun * damage.max())


@st.composite
def tables(draw: st.DrawFn) -> tuple[Costs, Damages, int]:
    """Draw small whole damages, so that ties abound and every sum is exact."""
    shape = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    size = shape[0] * shape[1]
    high = draw(st.sampled_from([5, 1000, 10**12]))
    cost = draw(st.lists(st.integers(0, high), min_size=size, max_size=size))
    values = st.one_of(st.integers(-9, 9).map(float), st.just(math.inf))
    damage = np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(shape)
    damage[np.isinf(damage).all(axis=1), 0] = 1.0
    return np.array(cost).reshape(shape), damage, draw(st.integers(0, sum(cost)))


@given(tables())
def test_equals_brute_force(problem: tuple[Costs, Damages, int]) -> None:
    cost, damage, budget = problem
    best = least_damage(cost, damage, budget)
    if best is None:
        with pytest.raises(ValueError, match="cheapest"):
            allocate(cost, damage, budget)
    else:
        columns = allocate(cost, damage, budget)
        assert total(damage, columns) == best
        assert total(cost, columns) <= budget


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force_where_damages_span_many_magnitudes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 10**9, (7, 5))
    damage = 10.0 ** rng.uniform(-9, 9, (7, 5))
    budget = int(cost.min(axis=1).sum() + rng.integers(0, 10**9))
    best = least_damage(cost, damage, budget)
    assert best is not None
    assert total(damage, allocate(cost, damage, budget)) == pytest.approx(best, rel=1e-6)


def llama_70b() -> dict[str, tuple[int, ...]]:
    sizes = {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192)}
    mlp = {"gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672)}
    return {
        f"model.layers.{layer}.{'self_attn' if role in sizes else 'mlp'}.{role}_proj.weight": shape
        for layer in range(80)
        for role, shape in (sizes | mlp).items()
    }


@pytest.mark.parametrize("share", [0.37, 0.06])
@pytest.mark.parametrize("kind", ["roles alike", "layers differ", "random", "near-ties"])
def test_560_matrices_come_within_a_thousandth_of_the_bound(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    cost = state_bytes_table(llama_70b(), LEVELS, "bfloat16")
    damage = {
        "roles alike": damage_table(llama_70b(), KNOBS, LEVELS),
        "layers differ": damage_table(llama_70b(), replace(KNOBS, depth_slope=1.0), LEVELS),
        "random": np.sort(rng.uniform(size=cost.shape), axis=1) * cost[:, :1],
        "near-ties": (cost[:, :1] - cost) * (1 + 1e-6 * rng.normal(size=(560, 1))),
    }[kind]
    budget = int(cost[:, 0].sum() * share)
    columns = allocate(cost, damage, budget)
    assert total(cost, columns) <= budget
    assert total(damage, columns) <= lower_bound(cost, damage, budget) * 1.001
    assert allocate(cost.tolist(), damage.tolist(), budget) == columns


def test_rows_take_equal_columns_in_ascending_order() -> None:
    assert allocate([[3, 2, 2, 5]], [[1.0, 1.0, 1.0, 1.0]], 9) == [1]
    columns = allocate([[4, 2, 1]] * 30, [[0.0, 3.0, 5.0]] * 30, 71)
    assert columns == sorted(columns)
    assert len(set(columns)) > 1
    # Rows of another third column that is not chosen may swap the first two as well.
    assert allocate([[2, 1, 0], [2, 1, 1]] * 2, [[0.0, 1.0, 9.0], [0.0, 1.0, 2.0]] * 2, 6) == [
        *(0, 0, 1, 1)
    ]


def test_extreme_tables_are_solved() -> None:
    assert allocate([[1, 2], [1, 2]], [[math.inf, 0.0], [5.0, math.inf]], 3) == [1, 0]
    assert allocate([[2**40, 1]] * 3, [[0.0, 1.0]] * 3, 2**80) == [0, 0, 0]
    assert allocate([[2**50, 2**49 + 1]] * 4, [[0.0, 1e300]] * 4, 3 * 2**50 + 3) == [0, 0, 1, 1]
    assert allocate([[1, 0]] * 2, [[1e-300, 1e300], [0.0, 1e-300]], 1) == [0, 1]


@pytest.mark.parametrize(
    ("cost", "damage", "message"),
    [
        ([[9, 7], [9, 4]], [[0.0, 1.0], [0.0, 1.0]], "11 bytes"),
        ([[1, 2], [3, 4]], [[1.0, 2.0], [3.0]], "inhomogeneous"),
        ([[]], [[]], "one shape"),
        ([1, 2], [1.0, 2.0], "one shape"),
        ([[1, 2]], [[1.0]], "one shape"),
        ([["1"]], [[1.0]], "whole numbers"),
        ([[1.5]], [[1.0]], "whole numbers"),
        ([[-1]], [[1.0]], "whole numbers"),
        ([[2**60]], [[1.0]], "whole numbers"),
        ([[1]], [[math.nan]], "damage must lie"),
        ([[1]], [[-math.inf]], "damage must lie"),
        ([[1], [1]], [[1.0], [math.inf]], "row 1 of damage"),
        ([[1, 2]], [[1e308, -1e308]], "damage must lie"),
    ],
)
def test_bad_tables_are_named(cost: object, damage: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(cost, damage, 10)  # type: ignore[arg-type]


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints a debug line on the last of these; it would spoil `plan --format json`."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = rng.integers(1, 128, (6, 1))
        cost = size * 512 >> np.arange(9)
        weight = size * np.exp(rng.normal(size=(6, 1)))
        damage = weight * np.sqrt(1 - 2.0 ** -np.arange(9)) ** rng.choice([1, 2, 4, 8])
        allocate(cost, damage, int(cost[:, 0].sum() * rng.uniform(0.02, 0.9)))
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")
