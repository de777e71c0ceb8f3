"""The relaxation that bounds the knapsack: rows replaced by their convex hulls, solved greedily.

Walking down the hulls in order of value, loss saved per cost, is optimal where the last step may be
taken in part (Sinha and Zoltners 1979). Whole steps alone make an answer that is good, not best.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Indices = NDArray[np.intp]


class Steps:
    """Every step down a hull, from the cheapest entry of a row to its dearest, best value first.

    Args:
        costs: Per row, strictly ascending from 0.
        losses: Per row, descending.
    """

    def __init__(self, costs: list[Ints], losses: list[Ints]) -> None:
        hulls = [hull_of(*row) for row in zip(costs, losses, strict=True)]
        self.rows = np.repeat(np.arange(len(hulls)), [hull.size - 1 for hull in hulls])
        self.picks = np.concatenate([hull[1:] for hull in hulls])
        self.costs = np.concatenate([np.diff(c[h]) for c, h in zip(costs, hulls, strict=True)])
        self.gains = np.concatenate([-np.diff(x[h]) for x, h in zip(losses, hulls, strict=True)])
        # Stable, so steps of one row stay in their order.
        ranked = np.argsort(-(self.gains / self.costs), kind="stable")
        self.rows, self.picks = self.rows[ranked], self.picks[ranked]
        self.costs, self.gains = self.costs[ranked], self.gains[ranked]


class Rest:
    """The relaxed problem of some rows: their least loss as a convex function of the room.

    Args:
        steps: The steps of all rows.
        is_taken: Of shape (rows,), true for the rows to leave out.
        loss_at_start: What the other rows lose at their cheapest entries.
    """

    def __init__(self, steps: Steps, is_taken: NDArray[np.bool_], loss_at_start: int) -> None:
        kept = ~is_taken[steps.rows]
        self.rows, self.picks = steps.rows[kept], steps.picks[kept]
        gains = steps.gains[kept]
        self.costs = np.append(0, np.cumsum(steps.costs[kept]))
        self.losses: Ints = loss_at_start - np.append(0, np.cumsum(gains))
        self.slopes: NDArray[np.float64] = np.append(gains / steps.costs[kept], 0.0)

    def steps_within(self, room: Ints) -> Indices:
        """Count the whole steps that fit."""
        num_within: Indices = np.searchsorted(self.costs, room, side="right") - 1
        return num_within

    def bound(self, room: Ints, num_steps: Indices) -> Ints:
        """Bound the loss from below; `num_steps` is `steps_within(room)`."""
        partial = self.slopes[num_steps] * (room - self.costs[num_steps])
        # Wherever the bound decides, it is below 2**48 and its rounding error below 1/16.
        savings: Ints = np.floor(partial + 0.25).astype(np.int64)
        return self.losses[num_steps] - savings


def hull_of(costs: Ints, losses: Ints) -> Indices:
    """Return the positions of the entries on the lower convex hull of a row."""
    hull: list[int] = []
    points = [(int(cost), int(loss)) for cost, loss in zip(costs, losses, strict=True)]
    for position, (cost, loss) in enumerate(points):
        while len(hull) > 1:
            (c0, l0), (c1, l1) = points[hull[-2]], points[hull[-1]]
            if (l0 - l1) * (cost - c1) > (l1 - loss) * (c1 - c0):
                break
            hull.pop()
        hull.append(position)
    return np.array(hull)
