"""Exact allocation: one column per row, least damage, total cost within a budget.

The problem is the multiple-choice knapsack. Damages are counted in whole quanta, at most 2**-41 of
the answer, so that sums are exact in any order and ties are ties: an answer is optimal to about
1e-10 of what its damage exceeds the lowest of every row by, and exactly so where damages are small
whole numbers.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tuner.planning.knapsack import least_loss

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]

_QUANTA_BITS = 46
_CLIPPED = 2.0 ** (_QUANTA_BITS + 1)  # above any answer, and sums of it still fit 64 bits
_EXACT_FLOAT = 2**53


class AllocationError(ValueError):
    """No choice of columns fits the budget.

    Args:
        budget_bytes: What was asked for.
        minimum_bytes: The lowest total cost of any allowed choice.
    """

    def __init__(self, budget_bytes: int, minimum_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        super().__init__(
            f"a budget of {budget_bytes} bytes is too small: the cheapest allocation costs "
            f"{minimum_bytes} bytes; raise the budget by at least "
            f"{minimum_bytes - budget_bytes} bytes or allow cheaper columns"
        )


def allocate(cost_bytes: ArrayLike, damage: ArrayLike, budget_bytes: int) -> list[int]:
    """Choose one column per row so that the total damage is least and the cost fits the budget.

    Among answers of equal damage the one of lowest cost wins; identical rows then take their
    columns in ascending order, and any tie that remains is decided the same way every time.

    Args:
        cost_bytes: Whole numbers >= 0, one row per matrix and one column per level.
        damage: Numbers of the same shape, finite, or inf where a column may not be chosen.
        budget_bytes: The most that the chosen costs may add up to.

    Returns:
        The chosen column of each row.

    Raises:
        AllocationError: Even the cheapest allowed columns cost more than the budget.
        ValueError: The tables are ragged, empty, of different shapes, or hold values not allowed.
    """
    costs, damages = _checked(cost_bytes, damage)
    rows = [_frontier(*row) for row in zip(costs, damages, strict=True)]
    minimum = sum(int(row.costs[0]) for row in rows)
    if minimum > budget_bytes:
        raise AllocationError(int(budget_bytes), minimum)
    picks = _search(rows, min(int(budget_bytes) - minimum, _EXACT_FLOAT))
    chosen = [int(row.columns[pick]) for row, pick in zip(rows, picks, strict=True)]
    return _ascending(chosen, costs, damages)


@dataclass(frozen=True)
class _Row:
    """The columns of one row that no other beats: costs ascend, losses descend to zero."""

    columns: _Ints
    costs: _Ints
    losses: _Floats  # damage above the lowest damage of the row


def _checked(cost_bytes: ArrayLike, damage: ArrayLike) -> tuple[_Ints, _Floats]:
    costs = _table(cost_bytes, "cost_bytes")
    damages = _table(damage, "damage").astype(np.float64)
    if costs.shape != damages.shape:
        raise ValueError(
            f"cost_bytes and damage must have one shape, got {costs.shape} and {damages.shape}"
        )
    if not np.issubdtype(costs.dtype, np.integer):
        raise ValueError(f"cost_bytes must hold whole numbers, got {costs.dtype}; round them up")
    if costs.min() < 0 or int(costs.max()) * len(costs) > _EXACT_FLOAT:
        raise ValueError(
            f"cost_bytes must lie between 0 and {_EXACT_FLOAT // len(costs)}, "
            f"got {costs.min()} to {costs.max()}"
        )
    if np.isnan(damages).any() or np.isneginf(damages).any():
        raise ValueError("damage must be finite, or inf for a column that may not be chosen")
    closed = np.flatnonzero(np.isposinf(damages).all(axis=1))
    if closed.size:
        raise ValueError(f"row {closed[0]} of damage is inf throughout; allow at least one column")
    if np.abs(damages, where=np.isfinite(damages), out=np.zeros_like(damages)).max() > 1e300:
        raise ValueError("damage must lie between -1e300 and 1e300, or be inf; rescale it")
    return costs.astype(np.int64), damages


def _table(values: ArrayLike, name: str) -> NDArray[np.generic]:
    try:
        table = np.asarray(values)
    except ValueError:
        table = np.empty(0)
    if table.ndim != 2 or table.size == 0 or table.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be a table of numbers with one row per matrix, none ragged")
    return table


def _frontier(costs: _Ints, damages: _Floats) -> _Row:
    """Drop the columns that another one matches or beats in both cost and damage."""
    ranked = np.lexsort((damages, costs))  # stable: among equals the lower column stays
    lowest_before = np.minimum.accumulate(np.append(np.inf, damages[ranked]))[:-1]
    kept = ranked[damages[ranked] < lowest_before]
    return _Row(kept, costs[kept], damages[kept] - damages[kept[-1]])


def _search(rows: list[_Row], room: int) -> list[int]:
    """Search with ever finer quanta until they are fine against the answer itself."""
    costs = [row.costs - row.costs[0] for row in rows]
    scale = math.fsum(float(row.losses[0]) for row in rows)
    while True:
        shift = _QUANTA_BITS - math.frexp(scale)[1]
        quanta = [np.minimum(np.rint(np.ldexp(row.losses, shift)), _CLIPPED) for row in rows]
        picks = least_loss(costs, [row.astype(np.int64) for row in quanta], room)
        loss = math.fsum(float(row.losses[pick]) for row, pick in zip(rows, picks, strict=True))
        if loss == 0 or loss >= scale / 16:
            return picks
        scale = loss


def _ascending(chosen: list[int], costs: _Ints, damages: _Floats) -> list[int]:
    """Give identical rows their columns in ascending order, whatever order the search found."""
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    for row, (cost, damage) in enumerate(zip(costs, damages, strict=True)):
        groups.setdefault((cost.tobytes(), damage.tobytes()), []).append(row)
    result = list(chosen)
    for group in groups.values():
        for row, column in zip(group, sorted(chosen[row] for row in group), strict=True):
            result[row] = column
    return result
