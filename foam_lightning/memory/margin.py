"""What torch's caching allocator reserves on a GPU beyond the tensors, as state grows."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from foam_lightning.memory.allocator import Usage
from foam_lightning.plan import FoldPlan, Levers

# The uniform levels at which the allocator is replayed; the state is what they change.
_REPLAYED_LEVELS = (8, 4, 3, 2, 1, 0)


class Margin:
    """The margin of plans, from replays at a few uniform levels.

    How far the peak of reserved memory is above that of the tensors jumps from level to level. So
    the margin of a plan is the most at any replayed level that keeps no more state, and on a line
    between two of them: less state never needs more.

    Args:
        usage: Replays the allocator for a plan whose layers all have the same levels.
        state_bytes: Counts the state of a plan.
        workspace: What the libraries take from the allocator, in bytes, whatever the plan.
    """

    def __init__(
        self,
        usage: Callable[[FoldPlan], Usage],
        state_bytes: Callable[[FoldPlan], int],
        workspace: int,
    ) -> None:
        self._usage = usage
        self._state_bytes = state_bytes
        self._workspace = workspace
        self._excesses: dict[tuple[Levers, int], int] = {}

    def of(self, plan: FoldPlan) -> int:
        """Give the margin of a plan in bytes."""
        kept = self._state_bytes(plan)
        return math.ceil(np.interp(kept, *self._points(plan, kept)))

    def state_change(self, plan: FoldPlan, slack_bytes: int) -> int:
        """Tell by how many bytes the state may change for state and margin to change by so many.

        Args:
            plan: Where the change starts from.
            slack_bytes: Bytes more for both, or fewer if below 0.
        """
        kept = self._state_bytes(plan)
        states, margins = self._points(plan, math.inf)
        sums = np.add(states, margins)
        target = kept + np.interp(kept, states, margins) + slack_bytes
        # Beyond the ends the margin is what it is there.
        beyond = min(target - sums[0], 0) + max(target - sums[-1], 0)
        return math.floor(float(np.interp(target, sums, states) + beyond)) - kept

    def _points(self, plan: FoldPlan, most: float) -> tuple[list[int], list[int]]:
        """Give state and margin at uniform levels, the highest first, as far as `most` of state."""
        states: list[int] = []
        excesses = [0]
        for level in _REPLAYED_LEVELS:
            uniform = _at_level(plan, level)
            states.append(self._state_bytes(uniform))
            excesses.append(max(excesses[-1], self._excess(uniform, level)))
            if states[-1] >= most:
                break
        return states, [excess + self._workspace for excess in excesses[1:]]

    def _excess(self, uniform: FoldPlan, level: int) -> int:
        key = (uniform.levers, level)
        if key not in self._excesses:
            usage = self._usage(uniform)
            self._excesses[key] = usage.reserved - usage.requested
        return self._excesses[key]


def _at_level(plan: FoldPlan, level: int) -> FoldPlan:
    return replace(plan, levels=dict.fromkeys(plan.levels, level))
