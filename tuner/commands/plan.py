"""The command `plan`: what fits a budget, without training and without a GPU."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, Group, RenderableType

from foam_lightning.errors import ConfigError, FoamError, InfeasibleBudgetError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.resume import load_plan
from foam_lightning.validation import MODEL, check_ranges
from tuner.config.parser import Settings
from tuner.planning.planner import BudgetPlanner, nearby_budgets
from tuner.report.plan_table import (
    level_grid,
    plan_json,
    plan_table,
    tensor_table,
    tensors_as_json,
)


@dataclass(frozen=True)
class PlanAnswer:
    """A plan in the forms in which it is printed.

    Attributes:
        table: For people.
        json: For scripts.
        refusal: Why the plan cannot be trained, to be raised after printing; None if it can.
    """

    table: RenderableType
    json: str
    refusal: FoamError | None


def plan(
    job: Job,
    budget_bytes: int | None,
    *,
    uniform_level: int | None = None,
    given: FoldPlan | None = None,
    num_tensors: int = 0,
    picture: Path | None = None,
) -> PlanAnswer:
    """Find the plan for a budget, or account for one level everywhere or for a given plan.

    Args:
        job: What to train.
        budget_bytes: The budget of one device.
        uniform_level: The level of every matrix; None chooses levels for the budget.
        given: A plan to account for instead of choosing one, if there is no level.
        num_tensors: How many of the largest tensors at the peak to list.
        picture: A PNG file to draw the plan into; its folder must exist.

    Raises:
        ConfigError: There is no budget, level or plan, the picture cannot be written, or another
            optimizer than FOAM is asked for.
    """
    if not job.is_foam:
        raise ConfigError(
            f"plan is for model.optimizer foam only, got {job.model.optimizer}; remove it"
        )
    if uniform_level is not None:
        check_ranges("--", {"uniform-level": uniform_level}, {"uniform-level": MODEL["level"]})
        given = job.uniform_plan(uniform_level)
    if budget_bytes is None and given is None:
        raise ConfigError(
            "plan needs --memory-budget SIZE, or --uniform-level L or --fold-plan FILE to account "
            "for"
        )
    planner = BudgetPlanner(job, budget_bytes)
    found, refusal = _choose(planner) if given is None else _check(planner, given)
    account = planner.accountant.account(found)
    least = None if budget_bytes is None else planner.minimum.account
    minimum, minimum_host = (None, 0) if least is None else (least.peak_bytes, least.host_bytes)
    near = nearby_budgets(planner) if given is None else []
    tensors = planner.accountant.list_tensors(found) if num_tensors else []
    if picture is not None:
        _draw(planner, found, budget_bytes, picture)
    costs = planner.option_costs(found)
    table = plan_table(found, account, budget_bytes, minimum, near, costs, minimum_host)
    largest = tensors_as_json(tensors, num_tensors)
    return PlanAnswer(
        Group(table, tensor_table(tensors, num_tensors)) if tensors else table,
        plan_json(found, account, budget_bytes, minimum, near, largest, minimum_host),
        refusal,
    )


def _choose(planner: BudgetPlanner) -> tuple[FoldPlan, FoamError | None]:
    try:
        return planner.default_plan(), None
    except InfeasibleBudgetError as error:
        return planner.minimum.plan, error


def _check(planner: BudgetPlanner, given: FoldPlan) -> tuple[FoldPlan, FoamError | None]:
    try:
        planner.check(given)
    except InfeasibleBudgetError as error:
        return given, error
    return given, None


def _draw(planner: BudgetPlanner, found: FoldPlan, budget_bytes: int | None, path: Path) -> None:
    # matplotlib takes a second to import.
    from tuner.report.plan_plots import draw_plan
    from tuner.report.style import save

    num_weights = sum(math.prod(shape) for shape in planner.module.shapes.values())
    title = (
        f"Predicted peak memory: {_abbreviate(num_weights)} parameters, "
        f"batch {found.memory_options.batch_size} x {planner.job.data.sequence_length} tokens"
    )
    plans = {"Adam (level 0)": found}
    if any(found.levels.values()):
        adam = replace(found, levels=dict.fromkeys(found.levels, 0))
        plans = {"Adam, same\nmemory options": adam, "FOAM,\nthis plan": found}
    accounts = {name: planner.accountant.account(plan) for name, plan in plans.items()}
    grid, _ = level_grid(found.levels)
    try:
        save(draw_plan(accounts, budget_bytes, grid, title), path)
    except OSError as error:
        raise ConfigError(f"cannot write the picture {path}: {error.strerror or error}") from error


def _abbreviate(count: int) -> str:
    """Shorten a count: 6738415616 -> "6.7B"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.2g}{name}" if count < 100 * unit else f"{count // unit}{name}"
    return str(count)


def run_plan(settings: Settings) -> None:
    """Print what fits a budget."""
    job = settings.job()
    answer = plan(
        job,
        settings.memory_budget,
        uniform_level=settings.uniform_level,
        given=None if settings.fold_plan is None else load_plan(job, settings.fold_plan),
        num_tensors=settings.tensors,
        picture=None if settings.picture is None else Path(settings.picture),
    )
    if settings.format == "json":
        print(answer.json)
    else:
        Console().print(answer.table)
    if answer.refusal is not None:
        raise answer.refusal
