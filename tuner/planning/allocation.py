"""Allocation: one column per row, least total damage, total cost within a budget.

This is the multiple-choice knapsack problem, solved as a mixed-integer linear program. Small
problems are solved to optimality; large ones, such as 560 matrices of 9 levels that all differ, to
within 0.1 % of the least damage, since damage is an estimate in arbitrary units.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import csr_array  # type: ignore[import-untyped]

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]

_EXACT_FLOAT = 2**53
_RELATIVE_GAP = 1e-3
_MAX_EXACT_VARIABLES = 400  # up to so many the gap is 0, which takes well under a second
_NODES_TIMES_VARIABLES = 200_000  # a limit on the search tree that bounds its time
_OBJECTIVE = 1e4  # the solver also stops at an absolute gap of 1e-6: now 1e-10 of the damage


class AllocationError(ValueError):
    """No choice of columns fits the budget.

    Args:
        budget_bytes: The budget.
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

    The same tables always have the same answer. Where two rows could swap columns at equal cost
    and damage, the earlier row has the lower column.

    Args:
        cost_bytes: Whole numbers >= 0, one row per matrix and one column per level.
        damage: Numbers of the same shape, finite, or inf where a column may not be chosen.
        budget_bytes: Limit on the sum of the chosen costs; it is never exceeded.

    Returns:
        The chosen column of each row.

    Raises:
        AllocationError: Even the cheapest allowed columns cost more than the budget.
        ValueError: The tables are ragged, empty, of different shapes, or hold values not allowed.
    """
    costs, damages = _checked(cost_bytes, damage)
    allowed = _undominated(costs, damages)
    cheapest = np.where(allowed, costs, _EXACT_FLOAT + 1).argmin(axis=1)
    rows = np.arange(len(costs))
    minimum = int(costs[rows, cheapest].sum())
    if minimum > budget_bytes:
        raise AllocationError(int(budget_bytes), minimum)
    # Losses: damage above the lowest of the row. Extra costs: above its cheapest column.
    losses = np.where(allowed, damages, np.inf)
    losses -= losses.min(axis=1, keepdims=True)
    extra = costs - costs[rows, cheapest][:, None]
    room = min(int(budget_bytes) - minimum, _EXACT_FLOAT)
    answer = _fill(cheapest, extra, losses, room)
    if loss := losses[rows, answer].sum():
        # A column that alone loses more than this answer is in no better one.
        in_shares = np.divide(losses, loss, out=np.full_like(losses, np.inf), where=losses <= loss)
        solved = _solve(extra, in_shares, room)
        if solved is not None:
            solved = _fill(_shrink(solved, extra, losses, room), extra, losses, room)
            if losses[rows, solved].sum() <= loss:
                answer = solved
    return _ascending(answer, costs, damages)


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


def _undominated(costs: _Ints, damages: _Floats) -> NDArray[np.bool_]:
    """Mark the columns that no other column of the row matches or beats in cost and damage."""
    cost, other_cost = costs[:, :, None], costs[:, None, :]
    loss, other_loss = damages[:, :, None], damages[:, None, :]
    column = np.arange(costs.shape[1])
    is_equal = (other_cost == cost) & (other_loss == loss)
    is_lower = np.where(is_equal, column[None, :] < column[:, None], True)
    is_beaten = (other_cost <= cost) & (other_loss <= loss) & is_lower
    found: NDArray[np.bool_] = np.isfinite(damages) & ~is_beaten.any(axis=2)
    return found


def _solve(costs: _Ints, losses: _Floats, room: int) -> _Ints | None:
    """Solve the problem up to the tolerances of the solver; None if it found no answer.

    Identical rows share variables that count how many of them take each column, which leaves few
    variables and no symmetry.

    Args:
        costs: Shape (rows, columns), 0 at the cheapest column of each row.
        losses: Likewise 0 at the best one; inf where a column may not be chosen.
        room: The most that the chosen costs may add up to.
    """
    tables = np.concatenate([costs.astype(np.float64), losses], axis=1)
    _, first, group_of, sizes = np.unique(
        tables, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    group, column = np.nonzero(np.isfinite(losses[first]))
    spent, lost = costs[first[group], column], losses[first[group], column]
    unit = max(int(np.gcd.reduce(spent)), 1)
    rel_gap = 0.0 if group.size <= _MAX_EXACT_VARIABLES else _RELATIVE_GAP
    node_limit = max(1, _NODES_TIMES_VARIABLES // group.size)
    one_each = csr_array((np.ones(group.size), (group, np.arange(group.size))))
    with _silenced_stdout():
        solved = milp(
            lost * _OBJECTIVE,
            constraints=[
                LinearConstraint(one_each, sizes, sizes),
                LinearConstraint((spent / unit)[None, :], -np.inf, room // unit),
            ],
            integrality=np.ones(group.size),
            bounds=Bounds(0, sizes[group]),
            options={"mip_rel_gap": rel_gap, "node_limit": node_limit},
        )
    if solved.x is None:
        return None
    counts = np.rint(solved.x).astype(np.int64)
    picks = np.zeros(len(costs), np.int64)
    for number, size in enumerate(sizes):
        of_group = group == number
        chosen = np.repeat(column[of_group], counts[of_group])
        if chosen.size != size:
            return None
        picks[group_of == number] = chosen
    return picks


@contextmanager
def _silenced_stdout() -> Iterator[None]:
    """Drop what native code writes to standard output.

    HiGHS 1.12 in scipy 1.17 prints a debug line even with `disp` off (jump-dev/HiGHS.jl#312),
    which would end up in `plan --format json`.
    """
    if sys.__stdout__ is None:  # closed, and its descriptor may belong to another file
        yield
        return
    native = ctypes.CDLL(None)
    sys.stdout.flush()
    native.fflush(None)
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
        native.fflush(None)
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def _shrink(picks: _Ints, costs: _Ints, losses: _Floats, room: int) -> _Ints:
    """Repair an answer over the budget, at the least loss per byte."""
    rows, picks = np.arange(len(picks)), picks.copy()
    while costs[rows, picks].sum() > room:
        saved = costs[rows, picks][:, None] - costs
        added = losses - losses[rows, picks][:, None]
        rate = np.divide(added, saved, out=np.full(losses.shape, np.inf), where=saved > 0)
        row, column = np.unravel_index(rate.argmin(), rate.shape)
        picks[row] = column
    return picks


def _fill(picks: _Ints, costs: _Ints, losses: _Floats, room: int) -> _Ints:
    """Use room that is left, where it saves the most loss per byte."""
    rows, picks = np.arange(len(picks)), picks.copy()
    while True:
        added = costs - costs[rows, picks][:, None]
        saved = losses[rows, picks][:, None] - losses
        left = room - costs[rows, picks].sum()
        rate = np.where((saved > 0) & (added <= left), saved / np.maximum(added, 1), 0)
        row, column = np.unravel_index(rate.argmax(), rate.shape)
        if not rate[row, column]:
            return picks
        picks[row] = column


def _ascending(picks: _Ints, costs: _Ints, damages: _Floats) -> list[int]:
    """Swap columns between rows so that they ascend, wherever cost and damage stay the same."""
    picks = picks.copy()
    rows = np.arange(len(picks))
    for row in rows:
        pick = picks[row]
        is_equal = [
            table[row, picks] + table[rows, pick] == table[row, pick] + table[rows, picks]
            for table in (costs, damages)
        ]
        later = np.flatnonzero((rows > row) & (picks < pick) & is_equal[0] & is_equal[1])
        if later.size:
            other = later[picks[later].argmin()]
            picks[row], picks[other] = picks[other], pick
    return [int(pick) for pick in picks]
