"""What a tenth more and a tenth less budget would change."""

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
    option_costs,
    selective_rows,
)
from foam_lightning.model.loss import min_rows_for_chunks
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.planning.knobs import Knobs, decode, nearest, state_bytes_table
from tuner.planning.scales import ADAM_QK_FACTOR, combine_plans, scale_plan

LEVELS = tuple(range(MAX_LEVEL + 1))
# With no run to learn from, damage is taken as convex in the bytes kept, so that matrices stay
# within a level or two of each other instead of some at 0 and the rest at the cap; but q and k are
# at 0 as long as the rest can make up for it, which was worth .03 and .12 nats (docs/log.md).
DEFAULT_KNOBS = Knobs(exponent=4.0, q=8.0, k=8.0)


@dataclass(frozen=True)
class MinimumBudget:
    """The smallest budget that works.

    Attributes:
        plan: The plan that needs it.
        account: Its peak, term by term.
    """

    plan: FoldPlan
    account: Account


class BudgetPlanner:
    """Find plans of one job whose predicted peak is within a budget.

    Args:
        job: What to train.
        budget_bytes: The budget of the device.
        like: Another of the same job, whose traces then serve both.
    """

    def __init__(self, job: Job, budget_bytes: int, *, like: "BudgetPlanner | None" = None) -> None:
        self.job = job
        self.budget_bytes = budget_bytes
        self.module: LlamaFoam = like.module if like else job.new_module()
        self.accountant: Accountant = like.accountant if like else job.new_accountant()
        length = job.data.sequence_length
        self.ladder = OptionLadder(
            job.memory_options,
            on_gpu=job.on_gpu,
            can_release=job.devices.count == 1,
            selective_rows=selective_rows(self.module.shapes, length, on_gpu=job.on_gpu),
            chunked_rows=min_rows_for_chunks(length),
        )

    @cached_property
    def _foldable(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what one device keeps of the matrices that fold."""
        share = self.job.devices.shard_shape
        return {name: share(shape) for name, shape in self.module.foldable.items()}

    def with_budget(self, budget_bytes: int) -> "BudgetPlanner":
        """Look at the same job within another budget; what was traced serves both."""
        return BudgetPlanner(self.job, budget_bytes, like=self)

    @cached_property
    def minimum(self) -> MinimumBudget:
        """The plan at the highest level, with the memory options that need least."""
        return self.least(MAX_LEVEL)

    def least(self, level: int) -> MinimumBudget:
        """Find the memory options that need least with every matrix at one level."""
        plans = [
            self.module.uniform_plan(level, memory_options)
            for memory_options in self.ladder.leanest()
        ]
        least: MinimumBudget | None = None
        # What the most promising needs rules most others out without a trace.
        for plan in sorted(plans, key=self.accountant.least):
            if least is None or self.accountant.fits(plan, least.account.peak_bytes - 1):
                least = MinimumBudget(plan, self.accountant.account(plan))
        assert least is not None
        return least

    @cached_property
    def memory_options(self) -> MemoryOptions:
        """The cheapest memory options that fit.

        Raises:
            InfeasibleBudgetError: None do.
            ConfigError: The settings contradict them.
        """
        found = self.ladder.cheapest(self._fits_uniform)
        if found is None:
            account = self.minimum.account
            raise InfeasibleBudgetError(
                self.budget_bytes, account.peak_bytes, account.binding, dict(account.breakdown)
            )
        self.job.check(found)
        return found

    @cached_property
    def uniform_levels(self) -> list[int]:
        """The uniform levels that fit with these memory options, lowest first."""
        return [level for level in LEVELS if self._fits_uniform(self.memory_options, level)]

    @property
    def adam_may_win(self) -> bool:
        """Whether level 0 everywhere fits, which makes Adam a plan that may win."""
        return 0 in self.uniform_levels

    @cached_property
    def max_state_bytes(self) -> int:
        """The bytes that the state of the matrices that fold may take, at most.

        What a plan needs beside them depends a little on the levels, so this is the most that any
        uniform plan leaves, and may be too much: `levels_for` looks again. State in host memory may
        take what it takes at the lowest level that fits.
        """
        if self.memory_options.state_offload:
            return self.folded_state_bytes(self.uniform(self.uniform_levels[0]))

        def allowance(plan: FoldPlan) -> int:
            slack = self.budget_bytes - self.accountant.account(plan).peak_bytes
            return self.folded_state_bytes(plan) + self.accountant.state_change(plan, slack)

        return max(allowance(self.uniform(level)) for level in LEVELS)

    def uniform(self, level: int) -> FoldPlan:
        """Make the plan with every matrix at one level."""
        return self.module.uniform_plan(level, self.memory_options)

    def check_feasible(self) -> None:
        """Make sure that some plan fits.

        Raises:
            InfeasibleBudgetError: None does.
            ConfigError: The settings contradict the one that does.
        """
        self.uniform(MAX_LEVEL)

    def fits(self, plan: FoldPlan) -> bool:
        """Tell whether the predicted peak of a plan is within the budget."""
        return self.accountant.fits(plan, self.budget_bytes)

    def check(self, plan: FoldPlan) -> None:
        """Refuse a plan that does not fit.

        Raises:
            InfeasibleBudgetError: Carries what the plan needs.
            ConfigError: The settings contradict the plan's memory options.
        """
        self.job.check(plan.memory_options)
        account = self.accountant.account(plan)
        if account.peak_bytes > self.budget_bytes:
            raise InfeasibleBudgetError(
                self.budget_bytes,
                account.peak_bytes,
                account.binding,
                dict(account.breakdown),
                subject="this plan",
            )

    def levels_for(self, knobs: Knobs, state_bytes: int) -> dict[str, int]:
        """Turn knobs into levels that fill so many bytes of state and fit the budget.

        Args:
            knobs: What to weight the damage of each matrix with.
            state_bytes: For the matrices that fold; at most the allowance is used.
        """
        return self._filled(state_bytes, partial(decode, self._foldable, knobs, LEVELS))

    def nearest(self, levels: Mapping[str, int]) -> dict[str, int]:
        """Find the levels that fit the budget and differ least from others.

        Args:
            levels: Those others, of the same matrices; as they are if they fit.
        """
        wanted = partial(nearest, self._foldable, levels, LEVELS)
        return self._filled(self.max_state_bytes, wanted)

    def folded_state_bytes(self, plan: FoldPlan) -> int:
        """Count the state of the matrices that fold, the part that a plan decides."""
        return optimizer_state_bytes(self._foldable, plan.levels, plan.memory_options.state_dtype)

    def default_plan(self) -> FoldPlan:
        """Make the plan for this budget before any run: Adam if it fits, else levels that fill.

        Where the state is in host memory, levels take nothing from the device, but every byte of
        state crosses the bus twice a step: then every matrix is at level 2, or above where it must.
        """
        if self.memory_options.state_offload:
            return self.uniform(max(TARGET_LEVEL, self.uniform_levels[0]))
        adam = self.uniform(0)
        if 0 in self.uniform_levels:
            return scale_plan(adam, qk_factor=ADAM_QK_FACTOR)
        levels = self.levels_for(DEFAULT_KNOBS, self.max_state_bytes)
        return combine_plans(levels, unfolded=adam, folded=self.uniform(self.uniform_levels[0]))

    def option_costs(self, plan: FoldPlan) -> dict[str, str]:
        """Say what the memory options of a plan cost in speed, by field of `MemoryOptions`."""
        shapes = self.module.shapes
        state = optimizer_state_bytes(shapes, plan.levels, plan.memory_options.state_dtype)
        return option_costs(plan.memory_options, shapes, state)

    def _filled(
        self, state_bytes: int, levels_within: Callable[[NDArray[np.int64], int], dict[str, int]]
    ) -> dict[str, int]:
        costs = state_bytes_table(self._foldable, LEVELS, self.memory_options.state_dtype)
        least = self.folded_state_bytes(self.uniform(MAX_LEVEL))
        allowed = min(state_bytes, self.max_state_bytes)
        while True:
            levels = levels_within(costs, allowed)
            plan = replace(self.uniform(0), levels=levels)
            excess = self.accountant.account(plan).peak_bytes - self.budget_bytes
            if excess <= 0 or allowed == least:
                return levels
            # The optimizer's workspace may be larger at these levels than at the one that leaves
            # most, perhaps by more than the state that is left to fold.
            change = self.accountant.state_change(plan, -excess)
            allowed = max(least, self.folded_state_bytes(plan) + change)

    def _fits_uniform(self, memory_options: MemoryOptions, level: int) -> bool:
        return self.fits(self.module.uniform_plan(level, memory_options))


PERCENT = 10


@dataclass(frozen=True)
class NearbyBudget:
    """The plan of another budget.

    Attributes:
        percent: How much more budget it is, below 0 how much less.
        budget_bytes: The budget.
        plan: Before any run, as the plan beside it; None where nothing fits.
        peak_bytes: Its predicted peak, at most the budget; None where nothing fits.
    """

    percent: int
    budget_bytes: int
    plan: FoldPlan | None
    peak_bytes: int | None


def nearby_budgets(planner: BudgetPlanner) -> list[NearbyBudget]:
    """Find the plans of a tenth more and of a tenth less budget, in this order.

    They share the traces of the budget in between, and so take little time beside it.

    Args:
        planner: Of the budget in between, whether anything fits it or not.
    """
    return [_nearby_budget(planner, percent) for percent in (PERCENT, -PERCENT)]


def _nearby_budget(planner: BudgetPlanner, percent: int) -> NearbyBudget:
    budget_bytes = planner.budget_bytes * (100 + percent) // 100
    if budget_bytes < planner.minimum.account.peak_bytes:
        return NearbyBudget(percent, budget_bytes, None, None)
    other = planner.with_budget(budget_bytes)
    try:
        plan = other.default_plan()
    except ConfigError:  # it would take a memory option that the settings contradict
        return NearbyBudget(percent, budget_bytes, None, None)
    return NearbyBudget(percent, budget_bytes, plan, other.accountant.account(plan).peak_bytes)


def mean_level(plan: FoldPlan) -> float:
    """Average the levels over the matrices that fold; 0 where none does."""
    return sum(plan.levels.values()) / max(1, len(plan.levels))
