"""The fold levels of one model that use a memory budget best, before anything is trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foam_lightning.errors import InfeasibleBudgetError
from foam_lightning.memory.account import Account, Accountant, optimizer_state_bytes
from foam_lightning.memory.options import MAX_LEVEL, TARGET_LEVEL
from foam_lightning.plan import FoldPlan
from tuner.planning.knobs import Knobs, decode, nearest_levels, state_bytes_table
from tuner.planning.scales import ADAM_QK_FACTOR, combine_plans, scale_plan

LEVELS = tuple(range(MAX_LEVEL + 1))
# Before any trial, damage is taken as convex in the bytes of state, so that the levels of matrices
# differ by one or two, instead of some at 0 and the rest at the cap. q and k stay at level 0 as
# long as the other matrices can save enough: 0.03 and 0.12 nats better (docs/log.md).
DEFAULT_KNOBS = Knobs(exponent=4.0, q=8.0, k=8.0)


class LevelPlanner(ABC):
    """Find levels whose predicted peak is within a budget, with given memory options.

    Attributes:
        accountant: Predicts the peak of a plan.
        budget_bytes: The budget of one device; None is no limit.
    """

    accountant: Accountant
    budget_bytes: int | None

    @property
    @abstractmethod
    def foldable(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the matrices that fold, as one device holds them."""

    @abstractmethod
    def uniform(self, level: int) -> FoldPlan:
        """Make the plan with every matrix at one level."""

    @cached_property
    def uniform_levels(self) -> list[int]:
        """The uniform levels that fit lowest first."""
        return [level for level in LEVELS if self.fits(self.uniform(level))]

    @property
    def adam_may_win(self) -> bool:
        """Whether level 0 everywhere fits, so that Adam is one of the plans to choose from."""
        return 0 in self.uniform_levels

    @cached_property
    def max_state_bytes(self) -> int:
        """The most bytes of optimizer state that the budget leaves for the matrices that fold.

        The rest of the peak depends a little on the levels, so this is the most that any uniform
        plan leaves, and may be too much: `levels_for` checks the account of what it finds. Without
        a budget, and for state in host memory, it is the state at the lowest level that fits.
        """
        if self.budget_bytes is None or self.uniform(0).memory_options.state_offload:
            return self.folded_state_bytes(self.uniform(self.uniform_levels[0]))

        def allowance(plan: FoldPlan) -> int:
            change = self.accountant.state_change(plan, -self.excess_bytes(plan))
            return self.folded_state_bytes(plan) + change

        return max(allowance(self.uniform(level)) for level in LEVELS)

    def fits(self, plan: FoldPlan) -> bool:
        """Whether the predicted peak of a plan is within the budget."""
        return self.budget_bytes is None or self.accountant.fits(plan, self.budget_bytes)

    def levels_for(self, knobs: Knobs, state_bytes: int) -> dict[str, int]:
        """Choose levels that use a number of bytes of state and fit the budget.

        Args:
            knobs: Weights of the damage that folding does to each matrix.
            state_bytes: Bytes for the matrices that fold; `max_state_bytes` at most is used.
        """
        return self._fill_budget(state_bytes, partial(decode, self.foldable, knobs, LEVELS))

    def nearest_levels(self, levels: Mapping[str, int]) -> dict[str, int]:
        """Find the levels that fit the budget and differ least from given ones.

        Args:
            levels: Levels of the same matrices; they come back unchanged if they fit.
        """
        choose = partial(nearest_levels, self.foldable, levels, LEVELS)
        return self._fill_budget(self.max_state_bytes, choose)

    def folded_state_bytes(self, plan: FoldPlan) -> int:
        """Count the state of the matrices that fold, the part that the levels decide."""
        return optimizer_state_bytes(self.foldable, plan.levels, plan.memory_options.state_dtype)

    def default_plan(self) -> FoldPlan:
        """Make the plan before any trial: Adam if it fits, else levels that fill the budget.

        With state in host memory, levels save nothing on the device, but every byte of state
        crosses the bus twice a step: then every matrix is at level 2, or above where it must be.
        """
        adam = self.uniform(0)
        if adam.memory_options.state_offload:
            return self.uniform(max(TARGET_LEVEL, self.uniform_levels[0]))
        if 0 in self.uniform_levels:
            return scale_plan(adam, qk_factor=ADAM_QK_FACTOR)
        levels = self.levels_for(DEFAULT_KNOBS, self.max_state_bytes)
        return combine_plans(levels, unfolded=adam, folded=self.uniform(self.uniform_levels[0]))

    def _fill_budget(
        self, state_bytes: int, choose: Callable[[NDArray[np.int64], int], dict[str, int]]
    ) -> dict[str, int]:
        costs = state_bytes_table(self.foldable, LEVELS, self.uniform(0).memory_options.state_dtype)
        smallest = self.folded_state_bytes(self.uniform(MAX_LEVEL))
        allowed = min(state_bytes, self.max_state_bytes)
        while True:
            levels = choose(costs, allowed)
            plan = replace(self.uniform(0), levels=levels)
            excess = self.excess_bytes(plan)
            if excess <= 0 or allowed == smallest:
                return levels
            # The optimizer's workspace may be larger at these levels than at the uniform level
            # that leaves most, perhaps by more than the state that is left to fold.
            change = self.accountant.state_change(plan, -excess)
            allowed = max(smallest, self.folded_state_bytes(plan) + change)

    def excess_bytes(self, plan: FoldPlan) -> int:
        """How far the peak of a plan is above the budget; below 0 if it fits, 0 without one."""
        if self.budget_bytes is None:
            return 0
        return self.accountant.account(plan).peak_bytes - self.budget_bytes

    def infeasible(self, account: Account, **words: Any) -> InfeasibleBudgetError:
        """Make the error of a plan that needs more than the budget, with the numbers."""
        assert self.budget_bytes is not None  # without a budget everything fits
        budget, breakdown = self.budget_bytes, dict(account.breakdown)
        return InfeasibleBudgetError(
            budget, account.peak_bytes, account.binding, breakdown, **words
        )
