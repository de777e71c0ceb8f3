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
        ValueError: Even the cheapest allowed columns cost more than the budget, or the tables are
            ragged, empty, of different shapes, or hold values not allowed.
    """
    costs, damages = _checked(cost_bytes, damage)
    losses = _without_dominated(costs, damages)
    cheapest = np.where(np.isfinite(losses), costs, _EXACT_FLOAT + 1).argmin(axis=1)
    rows = np.arange(len(costs))
    if (minimum := int(costs[rows, cheapest].sum())) > budget_bytes:
        raise ValueError(f"the cheapest columns cost {minimum} bytes, the budget is {budget_bytes}")
    # Losses: damage above the lowest of the row. Extra costs: above its cheapest column.
    losses -= losses.min(axis=1, keepdims=True)
    extra = costs - costs[rows, cheapest][:, None]
    room = min(int(budget_bytes) - minimum, _EXACT_FLOAT)
    answer = _fill(cheapest, extra, losses, room)
    if loss := losses[rows, answer].sum():
        # A column that alone loses more than this answer is in no better one.
        in_shares = np.divide(losses, loss, out=np.full_like(losses, np.inf), where=losses <= loss)
        solved = _fill(_solve(extra, in_shares, room, answer), extra, losses, room)
        if losses[rows, solved].sum() <= loss:
            answer = solved
    return _ascending(answer, costs, damages)


def _checked(cost_bytes: ArrayLike, damage: ArrayLike) -> tuple[_Ints, _Floats]:
    costs, damages = np.asarray(cost_bytes), np.asarray(damage, np.float64)
    if costs.ndim != 2 or not costs.size or costs.shape != damages.shape:
        raise ValueError(
            "cost_bytes and damage must be tables of one shape with one row per matrix, "
            f"got {costs.shape} and {damages.shape}"
        )
    limit = _EXACT_FLOAT // len(costs)
    if costs.dtype.kind not in "iu" or not 0 <= costs.min() <= costs.max() <= limit:
        raise ValueError(f"cost_bytes must hold whole numbers from 0 to {limit}; round up")
    if not (np.isposinf(damages) | (np.abs(damages) <= 1e300)).all():
        raise ValueError("damage must lie between -1e300 and 1e300, or be inf where not allowed")
    if (closed := np.isposinf(damages).all(axis=1)).any():
        raise ValueError(f"row {closed.argmax()} of damage is inf throughout; allow a column")
    return costs.astype(np.int64), damages


def _without_dominated(costs: _Ints, damages: _Floats) -> _Floats:
    """Set the damage to inf where another column of the row is no worse in cost and damage."""
    order = np.lexsort((damages, costs))  # by cost, then damage, then column
    by_cost = np.take_along_axis(damages, order, axis=1)
    lowest_before = np.full_like(by_cost, np.inf)
    lowest_before[:, 1:] = np.minimum.accumulate(by_cost, axis=1)[:, :-1]
    found = np.empty_like(damages)
    np.put_along_axis(found, order, np.where(by_cost < lowest_before, by_cost, np.inf), axis=1)
    return found


def _solve(costs: _Ints, losses: _Floats, room: int, fallback: _Ints) -> _Ints:
    """Solve the problem up to the tolerances of the solver, which may exceed `room` a little.

    Identical rows share variables that count how many of them take each column, which leaves few
    variables and no symmetry. Where the solver finds no answer, this is `fallback`.
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
    counts = np.zeros(1) if solved.x is None else np.rint(solved.x)
    if counts.sum() != len(costs):
        return fallback
    picks = np.empty(len(costs), np.int64)
    picks[np.argsort(group_of, kind="stable")] = np.repeat(column, counts.astype(np.int64))
    return picks


@contextmanager
def _silenced_stdout() -> Iterator[None]:
    """Drop a line that HiGHS 1.12 prints with `disp` off (HiGHS.jl#312), for the sake of JSON."""
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


def _fill(picks: _Ints, costs: _Ints, losses: _Floats, room: int) -> _Ints:
    """Free what exceeds the room, then use what is left of it, at the best loss per byte."""
    rows, picks = np.arange(len(picks)), picks.copy()
    while True:
        added = costs - costs[rows, picks][:, None]
        saved = losses[rows, picks][:, None] - losses
        left = room - costs[rows, picks].sum()
        helps = added < 0 if left < 0 else (saved > 0) & (added <= left)
        rate = np.where(helps, saved / np.maximum(np.abs(added), 1), -np.inf)
        row, column = np.unravel_index(rate.argmax(), rate.shape)
        if np.isneginf(rate[row, column]):
            return picks
        picks[row] = column


def _ascending(picks: _Ints, costs: _Ints, damages: _Floats) -> list[int]:
    """Swap columns between rows so that they ascend, wherever cost and damage stay the same."""
    picks, rows = picks.copy(), np.arange(len(picks))
    for row in rows:
        pick = picks[row]
        can_swap = (rows > row) & (picks < pick)
        for table in (costs, damages):
            swapped = table[row, picks] + table[rows, pick]
            can_swap &= swapped == table[row, pick] + table[rows, picks]
        if can_swap.any():
            other = np.flatnonzero(can_swap)[picks[can_swap].argmin()]
            picks[row], picks[other] = picks[other], pick
    return [int(pick) for pick in picks]
