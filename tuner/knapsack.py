"""The search of the exact multiple-choice knapsack, in whole numbers; `allocate` is its door.

Rows are taken one after another, from both ends, into two sides. A state is what some choice for
the rows of a side has spent and lost. Only those states survive that no other beats in both, and
from which the rest of the rows, relaxed to their convex hulls (Sinha and Zoltners 1979), could
still improve on the best complete answer known. Every state is completed greedily along the hulls,
which soon makes that answer good. At last each state of one side meets its best of the other.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.relaxation import Indices, Ints, Rest, Steps

_WIDTHS = (2**12, 2**16)  # states a side; the last one bounds memory to half a MiB per row
_NEGLIGIBLE = 1e-10  # of the loss: finer differences are not told apart
_NEVER = 2**62


def least_loss(costs: list[Ints], losses: list[Ints], room: int) -> list[int]:
    """Choose one entry per row so that the sum of losses is least within a sum of costs.

    A first, narrow search keeps only the most hopeful states of each row; mostly that is all of
    them, and else it finds a good answer with which a wider search discards more.

    Args:
        costs: Per row, strictly ascending from 0, together at most 2**53.
        losses: Per row, descending from at most 2**47.
        room: What the chosen costs may add up to, from 0 to 2**53.

    Returns:
        The position of the chosen entry in each row. Of equal losses, one of the lowest cost.

    Warns:
        RuntimeWarning: The widest search had to drop states too, as when hundreds of rows have
            unlike costs and losses all but proportional to them; the answer may miss the optimum
            by no more than the warning says.
    """
    # Rows alike stay together: their states coincide, so a hundred cost little more than one.
    order = sorted(range(len(costs)), key=lambda r: (-int(costs[r][-1]), losses[r].tobytes()))
    search = _Search([costs[row] for row in order], [losses[row] for row in order], room)
    if not any(search.is_exact(width) for width in _WIDTHS):
        gap = 1 - search.least_dropped / search.best[0]
        warnings.warn(
            f"this allocation is optimal to {gap:.1e} of its damage, not proven exact: it has too "
            "many nearly equal answers; round the damages or make more rows alike",
            RuntimeWarning,
            stacklevel=4,
        )
    picks = [0] * len(order)
    for row, pick in zip(order, search.answer, strict=True):
        picks[row] = pick
    return picks


@dataclass(frozen=True)
class _States:
    """What choices for the rows so far have spent and lost; each array has shape (states,)."""

    spent: Ints
    lost: Ints
    origins: Ints  # entry chosen in the last row * number of states before it + state before it

    def __getitem__(self, index: Indices | NDArray[np.bool_]) -> "_States":
        return _States(self.spent[index], self.lost[index], self.origins[index])

    def extended(self, entries: Indices, costs: Ints, losses: Ints) -> "_States":
        count = self.spent.size
        return _States(
            np.add.outer(costs[entries], self.spent).ravel(),
            np.add.outer(losses[entries], self.lost).ravel(),
            np.add.outer(entries * count, np.arange(count)).ravel(),
        )

    def undominated(self) -> "_States":
        if not self.spent.size:
            return self
        by_cost = self[np.argsort(self.spent, kind="stable")]
        lowest_before = np.minimum.accumulate(by_cost.lost[:-1])
        by_cost = by_cost[np.append(True, by_cost.lost[1:] < lowest_before)]
        # Of equal cost, the last to get here has lost least.
        return by_cost[np.append(by_cost.spent[:-1] < by_cost.spent[1:], True)]


class _Side:
    """The rows taken from one end, the states they lead to, and how each state came about."""

    def __init__(self, num_rows: int) -> None:
        nothing = np.zeros(1, np.int64)
        self.states = _States(nothing, nothing, nothing)
        self.rows: list[int] = []
        self.is_taken = np.zeros(num_rows, np.bool_)
        self.history: list[Ints] = []  # origins of the states kept before each row

    def take(self, row: int, states: _States) -> None:
        self.rows.append(row)
        self.is_taken[row] = True
        self.history.append(self.states.origins)
        self.states = states

    def trace(self, index: int, picks: list[int]) -> None:
        """Write the choices that a state is made of."""
        origins = self.states.origins
        for row, before in zip(reversed(self.rows), reversed(self.history), strict=True):
            picks[row], index = divmod(int(origins[index]), before.size)
            origins = before


class _Search:
    def __init__(self, costs: list[Ints], losses: list[Ints], room: int) -> None:
        self.costs = costs
        self.losses = losses
        self.room = room
        self.steps = Steps(costs, losses)
        self.starts = np.array([row[0] for row in losses])
        rest = Rest(self.steps, np.zeros(len(costs), np.bool_), int(self.starts.sum()))
        step = rest.steps_within(np.array([room]))[0]
        self.price = float(rest.slopes[step])  # loss that one more unit of room would save
        self.relaxed = float(rest.losses[step]) - self.price * float(room - rest.costs[step])
        self.answer = [0] * len(costs)
        self.best = (int(self.starts.sum()), 0)  # lost and spent by the answer
        self.least_dropped = _NEVER  # bound of the most hopeful state dropped for lack of width

    def is_exact(self, width: int) -> bool:
        """Improve the answer with up to `width` states a side; tell whether it is now optimal."""
        self.least_dropped = _NEVER
        num_rows = len(self.costs)
        front, back = _Side(num_rows), _Side(num_rows)
        while len(front.rows) + len(back.rows) < num_rows:
            if front.states.spent.size <= back.states.spent.size:
                self._take(front, len(front.rows), width)
            else:
                self._take(back, num_rows - 1 - len(back.rows), width)
        self._meet(front, back)
        return self.least_dropped >= self.best[0] * (1 - _NEGLIGIBLE)

    def _take(self, side: _Side, row: int, width: int) -> None:
        costs, losses = self.costs[row], self.losses[row]
        states = side.states.extended(self._affordable(costs, losses), costs, losses)
        side.take(row, states[states.spent <= self.room].undominated())
        if not side.states.spent.size:
            return
        rest = Rest(self.steps, side.is_taken, int(self.starts[~side.is_taken].sum()))
        num_steps = rest.steps_within(self.room - side.states.spent)
        self._complete(side, rest, num_steps)
        bound = side.states.lost + rest.bound(self.room - side.states.spent, num_steps)
        kept = self._hopeful(side.states, rest, bound)
        if kept.size > width:
            # Drawn at random among equal bounds, so that what is kept differs in what it spent.
            shuffled = np.random.default_rng(0).permutation(kept)
            ranked = shuffled[np.argsort(bound[shuffled], kind="stable")]
            self.least_dropped = min(self.least_dropped, int(bound[ranked[width]]))
            kept = np.sort(ranked[:width])
        side.states = side.states[kept]

    def _affordable(self, costs: Ints, losses: Ints) -> Indices:
        """Return the entries of a row that an answer as good as the best may still choose.

        At the price of room in the relaxed problem of all rows, an entry adds to its bound what it
        is dearer by than the best entry of its row.
        """
        dearness = losses + self.price * costs
        bound = np.ceil(self.relaxed + (dearness - dearness.min()) - 0.25)
        return np.flatnonzero(bound <= self.best[0])

    def _hopeful(self, states: _States, rest: Rest, bound: Ints) -> Indices:
        """Return the states that may lead to less loss than the best, or to its loss for less."""
        lost, spent = self.best
        hopeful = bound < lost
        ties = np.flatnonzero((bound == lost) & (states.spent < spent))
        room = spent - 1 - states.spent[ties]
        hopeful[ties] = states.lost[ties] + rest.bound(room, rest.steps_within(room)) <= lost
        return np.flatnonzero(hopeful)

    def _complete(self, side: _Side, rest: Rest, num_steps: Indices) -> None:
        """Add to every state all steps of the rest that fit, and keep the answer if it is best."""
        lost = side.states.lost + rest.losses[num_steps]
        spent = side.states.spent + rest.costs[num_steps]
        first = self._improved(lost, spent)
        if first is not None:
            self.answer = [0] * len(self.costs)
            side.trace(first, self.answer)
            for row, pick in zip(rest.rows[: num_steps[first]], rest.picks, strict=False):
                self.answer[row] = int(pick)

    def _meet(self, front: _Side, back: _Side) -> None:
        """Join every state in front with the one behind that loses least in the room left."""
        if not (front.states.spent.size and back.states.spent.size):
            return
        room = self.room - front.states.spent
        match = np.searchsorted(back.states.spent, room, side="right") - 1
        met = np.flatnonzero(match >= 0)
        match = match[met]
        lost = front.states.lost[met] + back.states.lost[match]
        first = self._improved(lost, front.states.spent[met] + back.states.spent[match])
        if first is not None:
            front.trace(int(met[first]), self.answer)
            back.trace(int(match[first]), self.answer)

    def _improved(self, lost: Ints, spent: Ints) -> int | None:
        """Take over the least loss, at the least cost, if it beats the best; return its index."""
        if not lost.size:
            return None
        leads = np.flatnonzero(lost == lost.min())
        first = int(leads[np.argmin(spent[leads])])
        found = (int(lost[first]), int(spent[first]))
        if found >= self.best:
            return None
        self.best = found
        return first
