"""The plans of a job whose predicted peak is within a memory budget."""

from dataclasses import dataclass
from functools import cached_property

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.memory.account import Account, Accountant, optimizer_state_bytes
from foam_lightning.memory.options import (
    MAX_LEVEL,
    OptionLadder,
    min_rows_for_selective_checkpointing,
    option_costs,
)
from foam_lightning.model.loss import min_rows_for_chunks
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.planning.levels import LevelPlanner


@dataclass(frozen=True)
class MinimumBudget:
    """The smallest budget that works.

    Attributes:
        plan: The plan with this peak.
        account: Its peak, term by term.
    """

    plan: FoldPlan
    account: Account


class BudgetPlanner(LevelPlanner):
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
            can_release=job.devices.count == 1 and not job.trainer.scales_gradients,
            clips_all=bool(job.trainer.gradient_clip_val),
            min_selective_rows=min_rows_for_selective_checkpointing(
                self.module.shapes, length, on_gpu=job.trainer.is_on_gpu
            ),
            min_chunked_rows=min_rows_for_chunks(length),
        )

    @cached_property
    def foldable(self) -> dict[str, tuple[int, ...]]:
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
            raise self.infeasible(self.minimum.account)
        self.job.check_memory_options(self._fastest_options)
        # With the least state; what is trained in the end is checked again.
        smallest = self.module.uniform_plan(MAX_LEVEL, self._fastest_options)
        self.job.check_host_memory(self.accountant.host_bytes(smallest))

    def uniform(self, level: int) -> FoldPlan:
        """Make the plan with every matrix at one level."""
        return self.module.uniform_plan(level, self.memory_options)

    def check(self, plan: FoldPlan) -> None:
        """Refuse a plan that does not fit.

        Raises:
            InfeasibleBudgetError: The plan needs more; the error has the numbers.
            ConfigError: The settings contradict the plan's memory options.
        """
        self.job.check_memory_options(plan.memory_options)
        self.job.check_host_memory(self.accountant.host_bytes(plan))
        if self.excess_bytes(plan) > 0:
            raise self.infeasible(self.accountant.account(plan), subject="this plan")

    def option_costs(self, plan: FoldPlan) -> dict[str, str]:
        """Describe what a plan's memory options cost in speed, by field of `MemoryOptions`."""
        shapes = self.module.shapes
        state = optimizer_state_bytes(shapes, plan.levels, plan.memory_options.state_dtype)
        return option_costs(plan.memory_options, shapes, state, self.accountant.gradient_bytes)

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
        host_bytes: What it keeps in host memory.
    """

    percent: int
    budget_bytes: int
    plan: FoldPlan | None
    peak_bytes: int | None
    host_bytes: int = 0


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
    account = other.accountant.account(plan)
    return NearbyBudget(percent, budget_bytes, plan, account.peak_bytes, account.host_bytes)


def mean_level(plan: FoldPlan) -> float:
    """Average the levels over the matrices that fold; 0 where none does."""
    return sum(plan.levels.values()) / max(1, len(plan.levels))
