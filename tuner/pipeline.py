"""The pipeline of a run: `tune` finds a plan for a budget, `fit` then trains by it and exports."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from foam_lightning.plan import FoldPlan
from foam_lightning.storage.atomic import write_json
from foam_lightning.training import PROFILE, train, versions
from foam_lightning.units import ByteSize, format_bytes_apart
from tuner.console import say
from tuner.oom_fallback import Fallback
from tuner.rehearsal import rehearse_plan, rehearse_tightest_plan
from tuner.report.plan_table import plan_table
from tuner.report.report import write_report
from tuner.report.verdict import adam_requirement, verdict
from tuner.run_context import RunContext
from tuner.search_step import not_tuned_message, search_plan
from tuner.trials.budget import SearchBudget
from tuner.trials.results import SearchResult


@dataclass(frozen=True)
class TunedPlan:
    """The plan for the full run, and what it rests on.

    Attributes:
        plan: The plan.
        search_result: What the search found; None where the options allow no search.
        pictures: PNG files of plan and search, by title.
    """

    plan: FoldPlan
    search_result: SearchResult | None
    pictures: Mapping[str, Path]


def tune(context: RunContext) -> TunedPlan | None:
    """Find the plan for a budget, prove it on two real steps, and save it.

    Calling it again on the same folder resumes.

    Args:
        context: The run, with a worker.

    Returns:
        What was found; None where another worker leads, which continues alone.

    Raises:
        InfeasibleBudgetError: No plan fits.
        MemoryShortageError: A run needs more than was predicted, and more than there is.
    """
    assert context.worker is not None
    job, planner, folder = context.job, context.planner, context.folder
    levels = planner.uniform_levels
    say(f"uniform levels within {ByteSize(context.budget_bytes)}: {levels[0]} to {levels[-1]}")

    search_budget = SearchBudget.from_options(context.tune_options, job.trainer.max_steps)
    search_result = None
    if search_budget is None:
        say(not_tuned_message(context.tune_options, job.trainer.max_steps))
    else:
        planner = rehearse_tightest_plan(context)
        search_result = search_plan(context, planner, search_budget)
        say(f"{search_result.reason[0].upper()}{search_result.reason[1:]}.")
    if not context.worker.claim_lead():
        return None

    found = search_result.winner.plan if search_result else planner.default_plan()
    plan, rehearsal = rehearse_plan(context, planner, context.with_memory_options(found))
    account = planner.accountant.account(plan)
    budget_bytes = context.budget_bytes
    costs = planner.option_costs(plan)
    Console(soft_wrap=True).print(plan_table(plan, account, budget_bytes, None, option_costs=costs))
    say(f"rehearsal: {rehearsal}")
    pictures: Mapping[str, Path] = {}
    if search_result is not None:
        summary = verdict(search_result, adam_requirement(planner), job.trainer.max_steps)
        adam = planner.accountant.account(planner.uniform(0))
        pictures = write_report(folder.tuning, search_result, summary, account, adam, budget_bytes)
        say(summary)
    plan.save(folder.plan)
    return TunedPlan(plan, search_result, pictures)


def fit(context: RunContext, plan: FoldPlan | None = None) -> dict[str, Any] | None:
    """Do a whole run, from the plan to the exported model.

    Calling it again on the same folder resumes.

    Args:
        context: The run; without a plan it has a worker.
        plan: The plan to train by; None tunes one first.

    Returns:
        The content of `summary.json`; None where another worker leads, which continues alone or
        has finished the run already.

    Raises:
        InfeasibleBudgetError: No plan fits.
        MemoryShortageError: A run needs more than was predicted, and more than there is.
        CheckpointError: The checkpoint cannot be read, or is of another plan.
        BusyError: Another process trains in the folder.
    """
    folder = context.folder
    if plan is not None:
        with folder.lock():
            plan.save(folder.plan)
            return _train(context, plan, None)
    folder.check_unlocked()  # say so now, not after the search
    tuned = tune(context)
    if tuned is None:
        return None
    with folder.lock():
        if folder.summary.exists():  # by the worker that led before this one
            say(f"{folder.path} is finished")
            return None
        return _train(context, tuned.plan, tuned)


def _train(context: RunContext, plan: FoldPlan, tuned: TunedPlan | None) -> dict[str, Any]:
    """Train and export, and write `summary.json` unless `trainer.max_time` ended the run."""
    job, planner, folder = context.resumed_job or context.job, context.planner, context.folder
    folder.write_config(context.settings_text)
    predicted = planner.accountant.account(plan).peak_bytes if job.is_foam else None
    text = f"training: {job.trainer.max_steps} steps"
    if predicted is not None:
        peak, *_ = format_bytes_apart(predicted, planner.budget_bytes or predicted)
        text += f", predicted peak {peak}"
    say(text)
    trained = train(
        job,
        plan,
        folder,
        predicted_bytes=predicted,
        budget_bytes=planner.budget_bytes,
        pictures=tuned.pictures if tuned else None,
        ckpt_path=context.ckpt_path,
    )
    if job.trainer.arguments.get("profiler"):
        for path in sorted(folder.path.glob(f"fit-{PROFILE}*")):
            say(f"profile: {path}")
    found = tuned.search_result if tuned else None
    fallback = Fallback.load(folder.fallback)
    summary = {
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": trained.measured_peak_bytes,
        "reference_loss": found.loss_of("reference") if found else None,
        "tuned_loss": found.winner.loss if found else None,
        "uniform_loss": found.loss_of("uniform") if found else None,
        "final_validation_loss": trained.final_validation_loss,
        "validation_tokens": trained.validation_tokens,
        "tokens_per_second": trained.tokens_per_second,
        "proxy_model": plan.proxy_model,
        "started_from": None if context.ckpt_path is None else str(context.ckpt_path),
        "steps": trained.steps,
        "max_steps": job.trainer.max_steps,
        "ended_by": trained.ended_by,
        "is_finished": trained.is_finished,
        "skipped_steps": trained.skipped_steps,
        "rollbacks": trained.rollbacks,
        "fallbacks": len(fallback.events) if fallback else 0,
        "versions": versions(),
        "seed": job.seed,
    }
    if trained.is_finished:
        write_json(folder.summary, summary)
    return summary
