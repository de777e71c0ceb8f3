"""What a tenth more and a tenth less budget would change."""

from dataclasses import dataclass

from foam_lightning.errors import ConfigError
from foam_lightning.plan import FoldPlan
from tuner.fitting import Fitting

PERCENT = 10


@dataclass(frozen=True)
class Neighbour:
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


def neighbours(fitting: Fitting) -> list[Neighbour]:
    """Find the plans of a tenth more and of a tenth less budget, in this order.

    They share the traces of the budget in between, and so take little time beside it.

    Args:
        fitting: Of the budget in between, whether anything fits it or not.
    """
    return [_neighbour(fitting, percent) for percent in (PERCENT, -PERCENT)]


def _neighbour(fitting: Fitting, percent: int) -> Neighbour:
    budget_bytes = fitting.budget_bytes * (100 + percent) // 100
    if budget_bytes < fitting.minimum.account.peak_bytes:
        return Neighbour(percent, budget_bytes, None, None)
    other = fitting.with_budget(budget_bytes)
    try:
        plan = other.untuned()
    except ConfigError:  # it would take a lever that the settings contradict
        return Neighbour(percent, budget_bytes, None, None)
    return Neighbour(percent, budget_bytes, plan, other.accountant.account(plan).peak_bytes)


def mean_level(plan: FoldPlan) -> float:
    """Average the levels over the matrices that fold; 0 where none does."""
    return sum(plan.levels.values()) / max(1, len(plan.levels))
