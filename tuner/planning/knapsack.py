"""The search of the exact multiple-choice knapsack, in whole numbers; `allocate` is its door.

Rows are taken one after another, from both ends, into two sides. A state is what some choice for
the rows of a side has spent and lost. Only those states survive that no other beats in both, and
from which the rest of the rows, relaxed to their convex hulls (Sinha and Zoltners 1979), could
still improve on the best complete answer known. Every state is completed greedily along the hulls,
and each of one side meets its best of the other beside rows that stay on their hulls, which soon
makes that answer good: where many answers are nearly equal, as good as the bound after a few rows.
Entries from which the bound is worse than the answer are then dropped, for good.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.planning.relaxation import Indices, Ints, Rest, Steps

_CORE = 48  # rows that the answer hangs on: in searches of them alone, sides meet at every row
_ALL = 2**62
# States a side, the most of which bound memory to half a MiB per row; and rows.
_SEARCHES = ((2**10, _CORE), (2**13, _CORE), (2**13, _ALL), (2**16, _ALL))
_NEAR = 4  # steps of the rows between, on either side, with which joined states are tried
_NEGLIGIBLE = 1e-10  # of the loss: finer differences are not told apart
_NEVER = 2**62


def least_loss(costs: list[Ints], losses: list[Ints], room: int) -> list[int]:
    """Choose one entry per row so that the sum of losses is least within a sum of costs.

    First searches look at a few rows for a good answer, with which most entries of the others are
    dropped. The next keeps only the most hopeful states of each row, mostly all of them, and else
    finds a better answer with which a wider search discards more.

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
    everything = [np.arange(row.size) for row in costs]
    search = _Search(costs, losses, room, everything, [0] * len(costs))
    for number, (width, num_rows) in enumerate(_SEARCHES):
        if number:
            search = search.narrowed()
        if search.is_exact(width, num_rows):
            break
    else:
        gap = 1 - search.least_dropped / search.best[0]
        warnings.warn(
            f"this allocation is optimal to {gap:.1e} of its damage, not proven exact: it has too "
            "many nearly equal answers; round the damages or make more rows alike",
            RuntimeWarning,
            stacklevel=4,
        )
    return [int(row[pick]) for row, pick in zip(search.entries, search.answer, strict=True)]


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
    """The search among some entries of every row.

    Args:
        costs: As in `least_loss`, but for a common unit.
        losses: Likewise.
        room: Likewise.
        entries: By row, which of the first entries these are.
        answer: A choice that fits, by row.
    """

    def __init__(
        self,
        costs: list[Ints],
        losses: list[Ints],
        room: int,
        entries: list[Indices],
        answer: list[int],
    ) -> None:
        # Only multiples of the common unit can be spent; counting in it makes every bound tighter.
        unit = max(int(np.gcd.reduce(np.concatenate(costs))), 1)
        costs, room = [row // unit for row in costs], room // unit
        self.entries = entries
        self.costs = costs
        self.losses = losses
        self.room = room
        self.steps = Steps(costs, losses)
        self.starts = np.array([row[0] for row in losses])
        self.whole = Rest(self.steps, np.zeros(len(costs), np.bool_), int(self.starts.sum()))
        step = self.whole.steps_within(np.array([room]))[0]
        self.price = float(self.whole.slopes[step])  # loss that one more unit of room would save
        spare = float(room - self.whole.costs[step])
        self.relaxed = float(self.whole.losses[step]) - self.price * spare
        self.order = self._from_both_ends()
        self.answer = answer
        lost, spent = (
            sum(int(row[pick]) for row, pick in zip(table, answer, strict=True))
            for table in (losses, costs)
        )
        self.best = (lost, spent)  # by the answer
        self.least_dropped = _NEVER  # bound of the most hopeful state dropped for lack of width

    def _from_both_ends(self) -> list[int]:
        """Order the rows such that those that the answer hangs on come first from either end.

        Those are the rows with a step of about the price of room (the core of Pisinger 1995): all
        others stay where the relaxed problem has them in any answer nearly as good. Rows alike stay
        together: their states coincide, so a hundred cost little more than one.
        """
        distance = np.full(len(self.costs), np.inf)
        np.minimum.at(
            distance, self.steps.rows, np.abs(self.steps.gains / self.steps.costs - self.price)
        )
        alike: dict[tuple[float, bytes, bytes], list[int]] = {}
        for row, (cost, loss) in enumerate(zip(self.costs, self.losses, strict=True)):
            alike.setdefault((distance[row], cost.tobytes(), loss.tobytes()), []).append(row)
        groups = [alike[key] for key in sorted(alike)]
        return [row for group in [*groups[::2], *groups[1::2][::-1]] for row in group]

    def narrowed(self) -> "_Search":
        """Drop the entries that lead to nothing as good as the answer."""
        kept = [self._affordable(*row) for row in zip(self.costs, self.losses, strict=True)]
        return _Search(
            [row[of] - row[of[0]] for row, of in zip(self.costs, kept, strict=True)],
            [row[of] for row, of in zip(self.losses, kept, strict=True)],
            self.room - sum(int(row[of[0]]) for row, of in zip(self.costs, kept, strict=True)),
            [row[of] for row, of in zip(self.entries, kept, strict=True)],
            [int(np.searchsorted(of, pick)) for of, pick in zip(kept, self.answer, strict=True)],
        )

    def is_exact(self, width: int, num_rows: int) -> bool:
        """Improve the answer, and tell whether it is now optimal.

        Args:
            width: States a side, at most.
            num_rows: Rows to look at, at most.
        """
        self.least_dropped = _NEVER
        front, back = _Side(len(self.costs)), _Side(len(self.costs))
        num_rows = min(num_rows, len(self.costs))
        while len(front.rows) + len(back.rows) < num_rows and not self._is_settled():
            if front.states.spent.size <= back.states.spent.size:
                self._take(front, self.order[len(front.rows)], width)
            else:
                self._take(back, self.order[-1 - len(back.rows)], width)
            if len(front.rows) + len(back.rows) <= _CORE:
                self._meet(front, back)
        self._meet(front, back)
        is_complete = num_rows == len(self.costs)
        return self._is_settled() or (
            is_complete and self.least_dropped >= self.best[0] * (1 - _NEGLIGIBLE)
        )

    def _is_settled(self) -> bool:
        """Tell whether the answer is as good as the bound, and no cheaper one can be as good."""
        lost, spent = self.best
        if lost * (1 - _NEGLIGIBLE) > self.relaxed:
            return False
        cheaper = np.array([spent - 1])
        return (
            not spent or int(self.whole.bound(cheaper, self.whole.steps_within(cheaper))[0]) > lost
        )

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
            self._answer_with(rest, int(num_steps[first]))
            side.trace(first, self.answer)

    def _meet(self, front: _Side, back: _Side) -> None:
        """Join every state in front with the one behind that loses least in the room left.

        The rows between them take as many steps down their hulls as the middle of both leaves room
        for, or a few more or fewer.
        """
        if not (front.states.spent.size and back.states.spent.size):
            return
        is_taken = front.is_taken | back.is_taken
        rest = Rest(self.steps, is_taken, int(self.starts[~is_taken].sum()))
        middle = sum(int(side.states.spent[side.states.spent.size // 2]) for side in (front, back))
        within = int(rest.steps_within(np.array([max(self.room - middle, 0)]))[0])
        for num_steps in range(max(within - _NEAR, 0), min(within + _NEAR, rest.rows.size) + 1):
            self._join(front, back, rest, num_steps)

    def _join(self, front: _Side, back: _Side, rest: Rest, num_steps: int) -> None:
        room = self.room - int(rest.costs[num_steps]) - front.states.spent
        match = np.searchsorted(back.states.spent, room, side="right") - 1
        met = np.flatnonzero(match >= 0)
        match = match[met]
        lost = front.states.lost[met] + back.states.lost[match] + rest.losses[num_steps]
        spent = front.states.spent[met] + back.states.spent[match] + rest.costs[num_steps]
        first = self._improved(lost, spent)
        if first is not None:
            self._answer_with(rest, num_steps)
            front.trace(int(met[first]), self.answer)
            back.trace(int(match[first]), self.answer)

    def _answer_with(self, rest: Rest, num_steps: int) -> None:
        """Begin an answer: so many steps of the rest, and the cheapest entries of other rows."""
        self.answer = [0] * len(self.costs)
        for row, pick in zip(rest.rows[:num_steps], rest.picks, strict=False):
            self.answer[row] = int(pick)

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
