"""The rehearsal: two real steps, one evaluation and one checkpoint at full size."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import MixedPrecision

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.errors import ConfigError, InfeasibleBudgetError
from foam_lightning.job import Job
from foam_lightning.memory.device import (
    MemoryShortageError,
    limit_memory,
    memory_shortage_context,
)
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.atomic import write_json
from foam_lightning.units import format_bytes, format_bytes_apart
from tuner.console import say
from tuner.planning.planner import BudgetPlanner
from tuner.run_context import RunContext
from tuner.trials.cache import job_key

_STEPS = 2
# A plan that leaves a twentieth of the budget is rehearsed after the search only: predictions were
# within 0.1 % of what was measured (tests/benchmarks/results/memory_truth_cpu_2026-11.md).
_CLOSE_TO_BUDGET = 0.95
MAX_REHEARSALS = 4


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal measured.

    Attributes:
        predicted_peak_bytes: The peak that the account predicts.
        measured_peak_bytes: The peak: on a GPU of the whole process, on a CPU of the tensors.
        allocated_bytes: On a GPU, the peak of the bytes in tensors.
        reserved_bytes: On a GPU, the peak of what the caching allocator held for them.
        allocator_retries: On a GPU, how often it had to free cached memory first.
        context_bytes: On a GPU, the CUDA context after the rehearsal.
    """

    predicted_peak_bytes: int
    measured_peak_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    allocator_retries: int | None = None
    context_bytes: int | None = None

    def peak_to_plan_for(self, budget_bytes: int) -> int:
        """Return the predicted peak of a plan whose measured peak would be the budget."""
        return budget_bytes - (self.measured_peak_bytes - self.predicted_peak_bytes)

    def __str__(self) -> str:
        measured, predicted = format_bytes_apart(
            self.measured_peak_bytes, self.predicted_peak_bytes
        )
        text = f"peak {measured} measured, {predicted} predicted"
        if self.allocated_bytes is not None and self.reserved_bytes is not None:
            text += (
                f" ({format_bytes(self.allocated_bytes)} allocated, "
                f"{format_bytes(self.reserved_bytes)} reserved, "
                f"{self.allocator_retries} allocator retries"
            )
            if self.context_bytes is not None:
                text += f", {format_bytes(self.context_bytes)} context"
            text += ")"
        return text


def rehearse_tightest_plan(context: RunContext) -> BudgetPlanner:
    """Rehearse, before the search, the plan with the highest peak that the search may choose.

    Where it takes more than the budget, the search gets a smaller one, so that the plan that it
    finds can be trained. Without a plan close to the budget nothing is rehearsed.

    Args:
        context: The run; its worker is the only one that rehearses meanwhile.

    Returns:
        The planner for the search: that of the run, or one of a smaller budget.

    Raises:
        MemoryShortageError: No plan fits what the device really needs.
    """

    def tightest(planner: BudgetPlanner) -> FoldPlan:
        plans = [planner.default_plan(), planner.uniform(planner.uniform_levels[0])]
        return max(plans, key=lambda plan: planner.accountant.account(plan).peak_bytes)

    budget, planner = context.budget_bytes, context.planner
    plan = tightest(planner)
    while (found := _find(context, plan)) is not None and found.measured_peak_bytes > budget:
        planner = planner.with_budget(found.peak_to_plan_for(budget))  # as before it was resumed
        plan = tightest(planner)
    has_fallen_back = context.memory_options is not None  # to options that need less
    if has_fallen_back or planner.accountant.account(plan).peak_bytes < _CLOSE_TO_BUDGET * budget:
        return planner
    assert context.worker is not None
    with context.worker.turn():
        planner, _, rehearsal = _fold_until_it_fits(context, planner, plan, tightest)
    say(f"rehearsal of the tightest plan: {rehearsal}")
    return planner


def rehearse_plan(
    context: RunContext, planner: BudgetPlanner, plan: FoldPlan
) -> tuple[FoldPlan, Rehearsal]:
    """Rehearse the plan of the full run, and fold it further where it takes more than the budget.

    Args:
        context: The run.
        planner: The planner of the search.
        plan: The plan that was found.

    Returns:
        The plan to train by, and its rehearsal.

    Raises:
        MemoryShortageError: No plan fits what the device really needs.
    """

    def fold_further(tighter: BudgetPlanner) -> FoldPlan:
        return replace(
            plan, levels=tighter.nearest_levels(plan.levels), memory_options=tighter.memory_options
        )

    # Options that a run fell back to are not the planner's, so its levels would not fit them.
    choose = fold_further if context.memory_options is None else None
    _, plan, rehearsal = _fold_until_it_fits(context, planner, plan, choose)
    # Not before: the search of a resumed run has to find the plans of the first one.
    planner.accountant.raise_context(rehearsal.context_bytes or 0)
    return plan, rehearsal


def _fold_until_it_fits(
    context: RunContext,
    planner: BudgetPlanner,
    plan: FoldPlan,
    choose: Callable[[BudgetPlanner], FoldPlan] | None,
) -> tuple[BudgetPlanner, FoldPlan, Rehearsal]:
    """Rehearse plans, each for a budget smaller by what the one before took too much.

    Args:
        context: The run.
        planner: Where the plan comes from.
        plan: The first plan.
        choose: Finds the next one in a smaller budget; None allows the first one only.
    """
    budget = context.budget_bytes
    for number in range(1, MAX_REHEARSALS + 1):
        rehearsal = rehearse(context, plan)
        excess = rehearsal.measured_peak_bytes - budget
        if excess <= 0:
            return planner, plan, rehearsal
        taken, limit = format_bytes_apart(rehearsal.measured_peak_bytes, budget)
        reason = f"it took {taken}, the budget is {limit}"
        shortage = MemoryShortageError("the rehearsal", plan, _STEPS, reason)
        if number == MAX_REHEARSALS or choose is None:
            break
        try:
            planner = planner.with_budget(rehearsal.peak_to_plan_for(budget))
            plan = choose(planner)
        except (InfeasibleBudgetError, ConfigError) as error:
            raise shortage from error
        say(f"rehearsal: {rehearsal}; {excess} B above the budget, folding further")
    raise shortage


def rehearse(context: RunContext, plan: FoldPlan) -> Rehearsal:
    """Run what the full run will do, once, and measure its peak.

    The result is kept in `tuning/rehearsal.json`; a second call reads it, unless the device, a
    package or an input has changed since.

    Args:
        context: The run.
        plan: What to train by.

    Raises:
        MemoryShortageError: The device has not enough memory.
    """
    rehearsal = _find(context, plan)
    if rehearsal is None:
        predicted = context.planner.accountant.account(plan).peak_bytes
        rehearsal = Rehearsal(predicted, *_measure(context.job, plan, context.folder.tuning))
        record = {**asdict(rehearsal), "fold_plan": plan.to_json(), "job": job_key(context.job)}
        write_json(_file(context), [*_records(context), record])
    if (gpu := context.job.gpu) is not None and rehearsal.context_bytes is not None:
        # The context has grown, so the allocator gets less.
        limit_memory(gpu, context.budget_bytes, rehearsal.context_bytes)
    return rehearsal


def _find(context: RunContext, plan: FoldPlan) -> Rehearsal | None:
    for record in _records(context):
        key = job_key(context.job)
        # The records of older runs do not say what they are of, besides the plan.
        if (record.pop("fold_plan"), record.pop("job", key)) == (plan.to_json(), key):
            return Rehearsal(**record)
    return None


def _records(context: RunContext) -> list[dict[str, Any]]:
    path = _file(context)
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return content if isinstance(content, list) else [content]  # older runs have one


def _file(context: RunContext) -> Path:
    return context.folder.tuning / "rehearsal.json"


def _measure(job: Job, plan: FoldPlan, folder: Path) -> tuple[int, ...]:
    """Return the measured peak and, on a GPU, the figures of the allocator and the context."""
    module = job.new_module()
    module.set_plan(plan)
    data = job.new_data(plan.memory_options)
    memory = MemoryMonitor(through_evaluation=True, gpu=job.gpu)
    trainer = job.new_trainer(
        plan.memory_options,
        [memory],
        bare=True,
        max_steps=_STEPS,
        limit_val_batches=1,
        val_check_interval=_STEPS,
        check_val_every_n_epoch=None,
    )
    if isinstance(plugin := trainer.precision_plugin, MixedPrecision) and plugin.scaler is not None:
        # No gradient overflows, so no step is skipped: the peak is that of a step that updates.
        plugin.scaler.load_state_dict({**plugin.scaler.state_dict(), "scale": 1.0})
    checkpoint = folder / "rehearsal.ckpt"
    checkpoint.unlink(missing_ok=True)  # of a rehearsal that was killed
    try:
        with memory_shortage_context("the rehearsal", plan, trainer):
            trainer.fit(module, datamodule=data)
            trainer.save_checkpoint(checkpoint)
    finally:
        checkpoint.unlink(missing_ok=True)
    assert memory.measured_bytes is not None
    if memory.usage is None or memory.context_bytes is None:
        return (memory.measured_bytes,)
    return memory.measured_bytes, *memory.usage, memory.context_bytes
