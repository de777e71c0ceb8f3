"""Budgets of a planner that tests start from."""

from dataclasses import replace

from foam_lightning.memory.options import MAX_LEVEL
from tuner.planning.planner import BudgetPlanner


def smallest_with_state_on_device(planner: BudgetPlanner) -> int:
    """Return the smallest budget in bytes at which levels matter: the state is on the device."""
    options = [each for each in planner.ladder.candidates_for_minimum() if not each.grad_offload]
    plans = [
        planner.module.uniform_plan(MAX_LEVEL, replace(each, state_offload=False))
        for each in options
    ]
    return min(planner.accountant.account(plan).peak_bytes for plan in plans)
