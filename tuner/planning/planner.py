"""The plans of a job whose predicted peak is within a memory budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from foam_lightning.errors import ConfigError, InfeasibleBudgetError
from foam_lightning.job import Job
from foam_lightning.memory.account import Account, Accountant, optimizer_state_bytes
from foam_lightning.memory.options import (
    MAX_LEVEL,
    TARGET_LEVEL,
    OptionLadder,
    min_rows_for_selective_checkpointing,
    option_costs,
)
from foam_lightning.model.loss import min_rows_for_chunks
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.planning.knobs import Knobs, decode, nearest_levels, state_bytes_table
from tuner.planning.scales import ADAM_QK_FACTOR, combine_plans, scale_plan

LEVELS = tuple(range(MAX_LEVEL + 1))
# Before any trial, damage is taken as convex in the bytes of state, so that the levels of matrices
# differ by one or two, instead of some at 0 and the rest at the cap. q and k stay at level 0 as
# long as the other matrices can save enough: 0.03 and 0.12 nats better (docs/log.md).
DEFAULT_KNOBS = Knobs(exponent=4.0, q=8.0, k=8.0)


@dataclass(frozen=True)
class MinimumBudget:
    """The smallest budget that works.

    Attributes:
        plan: The plan with this peak.
        account: Its peak, term by term.
    """

    plan: FoldPlan
    account: Account


class BudgetPlanner:
    """Find plans of one job whose predicted peak is within a budget.

    Args:
        job: What to train.
        budget_bytes: The budget of one device; None is no limit.
        share_traces_with: A planner of the same job, whose traces this one uses and extends.
    """

    def __init__(
        self,
        job: Job,
        budget_bytes: int | None,
        *,
        share_traces_with: "BudgetPlanner | None" = None,
    ) -> None:
        self.job = job
        self.budget_bytes = budget_bytes
        other = share_traces_with
        self.module: LlamaFoam = other.module if other else job.new_module()
        self.accountant: Accountant = other.accountant if other else job.new_accountant()
        length = job.data.sequence_length
        self.ladder = OptionLadder(
            job.memory_options,
            on_gpu=job.trainer.is_on_gpu,
            can_release=job.devices.count == 1,
            min_selective_rows=min_rows_for_selective_checkpointing(
                self.module.shapes, length, on_gpu=job.trainer.is_on_gpu
            ),
            min_chunked_rows=min_rows_for_chunks(length),
        )

    @cached_property
    def _foldable(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices that fold, as one device holds them."""
        shard = self.job.devices.shard_shape
        return {name: shard(shape) for name, shape in self.module.foldable.items()}

    def with_budget(self, budget_bytes: int | None) -> "BudgetPlanner":
        """Make a planner of the same job for another budget; both share their traces."""
        return BudgetPlanner(self.job, budget_bytes, share_traces_with=self)

    @cached_property
    def minimum(self) -> MinimumBudget:
        """The smallest budget: every matrix at the highest level, all useful memory options on."""
        return self.minimum_at(MAX_LEVEL)

    def minimum_at(self, level: int) -> MinimumBudget:
        """Find the smallest budget that works with every matrix at this level."""
        plans = [
            self.module.uniform_plan(level, memory_options)
            for memory_options in self.ladder.candidates_for_minimum()
        ]
        smallest: MinimumBudget | None = None
        # In order of their lower bounds, so that the first ones rule most others out untraced.
        for plan in sorted(plans, key=self.accountant.lower_bound):
            if smallest is None or self.accountant.fits(plan, smallest.account.peak_bytes - 1):
                smallest = MinimumBudget(plan, self.accountant.account(plan))
        assert smallest is not None
        return smallest

    @cached_property
    def _fastest_options(self) -> MemoryOptions | None:
        return self.ladder.find_fastest(self._fits_uniform)

    @cached_property
    def memory_options(self) -> MemoryOptions:
        """The fastest memory options that fit the budget.

        Raises:
            InfeasibleBudgetError: None fit.
            ConfigError: The settings contradict them.
        """
        self.check_feasible()
        assert self._fastest_options is not None
        return self._fastest_options

    def check_feasible(self) -> None:
        """Check that some plan fits the budget.

        Raises:
            InfeasibleBudgetError: None fits.
            ConfigError: The settings contradict the memory options that it takes.
        """
        if self._fastest_options is None:
            raise self._infeasible(self.minimum.account)
        self.job.check_memory_options(self._fastest_options)

    @cached_property
    def uniform_levels(self) -> list[int]:
        """The uniform levels that fit with these memory options, lowest first."""
        return [level for level in LEVELS if self._fits_uniform(self.memory_options, level)]

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
        if self.budget_bytes is None or self.memory_options.state_offload:
            return self.folded_state_bytes(self.uniform(self.uniform_levels[0]))

        def allowance(plan: FoldPlan) -> int:
            change = self.accountant.state_change(plan, -self._excess_bytes(plan))
            return self.folded_state_bytes(plan) + change

        return max(allowance(self.uniform(level)) for level in LEVELS)

    def uniform(self, level: int) -> FoldPlan:
        """Make the plan with every matrix at one level."""
        return self.module.uniform_plan(level, self.memory_options)

    def fits(self, plan: FoldPlan) -> bool:
        """Whether the predicted peak of a plan is within the budget."""
        return self.budget_bytes is None or self.accountant.fits(plan, self.budget_bytes)

    def check(self, plan: FoldPlan) -> None:
        """Refuse a plan that does not fit.

        Raises:
            InfeasibleBudgetError: The plan needs more; the error has the numbers.
            ConfigError: The settings contradict the plan's memory options.
        """
        self.job.check_memory_options(plan.memory_options)
        if self._excess_bytes(plan) > 0:
            raise self._infeasible(self.accountant.account(plan), subject="this plan")

    def levels_for(self, knobs: Knobs, state_bytes: int) -> dict[str, int]:
        """Choose levels that use a number of bytes of state and fit the budget.

        Args:
            knobs: Weights of the damage that folding does to each matrix.
            state_bytes: Bytes for the matrices that fold; `max_state_bytes` at most is used.
        """
        return self._fill_budget(state_bytes, partial(decode, self._foldable, knobs, LEVELS))

    def nearest_levels(self, levels: Mapping[str, int]) -> dict[str, int]:
        """Find the levels that fit the budget and differ least from given ones.

        Args:
            levels: Levels of the same matrices; they come back unchanged if they fit.
        """
        choose = partial(nearest_levels, self._foldable, levels, LEVELS)
        return self._fill_budget(self.max_state_bytes, choose)

    def folded_state_bytes(self, plan: FoldPlan) -> int:
        """Count the state of the matrices that fold, the part that the levels decide."""
        return optimizer_state_bytes(self._foldable, plan.levels, plan.memory_options.state_dtype)

    def default_plan(self) -> FoldPlan:
        """Make the plan before any trial: Adam if it fits, else levels that fill the budget.

        With state in host memory, levels save nothing on the device, but every byte of state
        crosses the bus twice a step: then every matrix is at level 2, or above where it must be.
        """
        if self.memory_options.state_offload:
            return self.uniform(max(TARGET_LEVEL, self.uniform_levels[0]))
        adam = self.uniform(0)
        if 0 in self.uniform_levels:
            return scale_plan(adam, qk_factor=ADAM_QK_FACTOR)
        levels = self.levels_for(DEFAULT_KNOBS, self.max_state_bytes)
        return combine_plans(levels, unfolded=adam, folded=self.uniform(self.uniform_levels[0]))

    def option_costs(self, plan: FoldPlan) -> dict[str, str]:
        """Describe what a plan's memory options cost in speed, by field of `MemoryOptions`."""
        shapes = self.module.shapes
        state = optimizer_state_bytes(shapes, plan.levels, plan.memory_options.state_dtype)
        return option_costs(plan.memory_options, shapes, state)

    def _fill_budget(
        self, state_bytes: int, choose: Callable[[NDArray[np.int64], int], dict[str, int]]
    ) -> dict[str, int]:
        costs = state_bytes_table(self._foldable, LEVELS, self.memory_options.state_dtype)
        smallest = self.folded_state_bytes(self.uniform(MAX_LEVEL))
        allowed = min(state_bytes, self.max_state_bytes)
        while True:
            levels = choose(costs, allowed)
            plan = replace(self.uniform(0), levels=levels)
            excess = self._excess_bytes(plan)
            if excess <= 0 or allowed == smallest:
                return levels
            # The optimizer's workspace may be larger at these levels than at the uniform level
            # that leaves most, perhaps by more than the state that is left to fold.
            change = self.accountant.state_change(plan, -excess)
            allowed = max(smallest, self.folded_state_bytes(plan) + change)

    def _excess_bytes(self, plan: FoldPlan) -> int:
        """How far the peak of a plan is above the budget; below 0 if it fits, 0 without one."""
        if self.budget_bytes is None:
            return 0
        return self.accountant.account(plan).peak_bytes - self.budget_bytes

    def _infeasible(self, account: Account, **words: str) -> InfeasibleBudgetError:
        assert self.budget_bytes is not None  # without a budget everything fits
        budget, breakdown = self.budget_bytes, dict(account.breakdown)
        return InfeasibleBudgetError(
            budget, account.peak_bytes, account.binding, breakdown, **words
        )

    def _fits_uniform(self, memory_options: MemoryOptions, level: int) -> bool:
        return self.fits(self.module.uniform_plan(level, memory_options))


NEARBY_PERCENT = 10


@dataclass(frozen=True)
class NearbyBudget:
    """The plan of a budget near the one that was asked for.

    Attributes:
        percent: How much larger this budget is; below 0 it is smaller.
        budget_bytes: The budget.
        plan: The default plan, as before any trial; None where nothing fits.
        peak_bytes: Its predicted peak; None where nothing fits.
    """

    percent: int
    budget_bytes: int
    plan: FoldPlan | None
    peak_bytes: int | None


def nearby_budgets(planner: BudgetPlanner) -> list[NearbyBudget]:
    """Plan for a budget 10 percent larger and one 10 percent smaller, in this order.

    Args:
        planner: For the budget between them, whether anything fits it or not; its traces are used.

    Returns:
        Both, or none where the planner has no budget.
    """
    if planner.budget_bytes is None:
        return []
    percents = (NEARBY_PERCENT, -NEARBY_PERCENT)
    return [_nearby_budget(planner, percent, planner.budget_bytes) for percent in percents]


def _nearby_budget(planner: BudgetPlanner, percent: int, budget: int) -> NearbyBudget:
    budget_bytes = budget * (100 + percent) // 100
    if budget_bytes < planner.minimum.account.peak_bytes:
        return NearbyBudget(percent, budget_bytes, None, None)
    other = planner.with_budget(budget_bytes)
    try:
        plan = other.default_plan()
    except ConfigError:  # the settings contradict a memory option that it takes
        return NearbyBudget(percent, budget_bytes, None, None)
    return NearbyBudget(percent, budget_bytes, plan, other.accountant.account(plan).peak_bytes)


def mean_level(plan: FoldPlan) -> float:
    """Average the levels over the matrices that fold; 0 where none does."""
    return sum(plan.levels.values()) / max(1, len(plan.levels))
