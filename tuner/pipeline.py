"""fit(): tune, unless there is a plan, then train and sum up."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foam_lightning.job import Job
from foam_lightning.memory.account import Account
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.training import Trained, train, versions
from foam_lightning.units import ByteSize, format_bytes
from tuner.oom_fallback import Fallback
from tuner.planning.planner import BudgetPlanner
from tuner.rehearsal import rehearse
from tuner.report.plan_table import plan_table
from tuner.report.report import write_report
from tuner.report.verdict import adam_requirement, verdict
from tuner.search.proxy_model import NoProxyModelError, ProxyModel
from tuner.search.search import search
from tuner.trials.budget import MAX_FINALISTS, SMALLEST_SEARCH, SearchBudget, TuneOptions
from tuner.trials.cache import job_key, load_earlier_trials
from tuner.trials.results import SearchResult
from tuner.trials.runner import TrialRunner
from tuner.trials.workers import Worker


@dataclass(frozen=True)
class Tuned:
    """The plan for the full run, and what it rests on.

    Attributes:
        plan: The plan.
        account: Its predicted peak.
        search_result: What the search found; None where there was too little time for any.
        pictures: PNG files of plan and search, by title.
    """

    plan: FoldPlan
    account: Account
    search_result: SearchResult | None
    pictures: Mapping[str, Path]


def tune(
    job: Job,
    planner: BudgetPlanner,
    folder: RunFolder,
    options: TuneOptions,
    *,
    worker: Worker | None = None,
    memory_options: MemoryOptions | None = None,
) -> Tuned | None:
    """Find the plan for a budget, prove it on two real steps, and write it down.

    Calling it again on the same folder takes up where it was left.

    Args:
        job: What to train.
        planner: Its plans that fit the memory of one device.
        folder: Gets `fold_plan.json` and `tuning/`.
        options: How much to search.
        worker: Who works on the search here; by default one that no other worker waits for.
        memory_options: What to run with where memory ran out with the memory options that the
            account chose. What is searched stays as it was: the levels that fit with those, so that
            finished trials count, and the memory that these save is not spent again.

    Returns:
        What was found; None where another worker has the lead, which goes on alone.

    Raises:
        InfeasibleBudgetError: No plan fits.
        MemoryShortageError: A run needs more than was predicted, and more than there is.
    """
    worker = worker or Worker(folder.tuning, "tune")
    console = Console(soft_wrap=True)
    budget_bytes = planner.budget_bytes
    levels = planner.uniform_levels
    console.print(
        f"run folder {folder.path}; uniform levels that fit {ByteSize(budget_bytes)}: "
        f"{levels[0]} to {levels[-1]}"
    )
    search_budget = SearchBudget.of(options, job.max_steps)
    pictures: Mapping[str, Path] = {}
    if search_budget is None:
        search_result, plan = None, planner.default_plan()
        console.print(_too_little(options, job.max_steps), highlight=False)
    else:
        proxy_model = _proxy_model(console, job, planner)
        if proxy_model is None:
            search_result = _search(
                console, job, planner, folder, search_budget, worker, memory_options
            )
        else:
            found = _search(
                console,
                proxy_model.job,
                proxy_model.planner,
                folder,
                search_budget,
                worker,
                memory_options,
            )
            search_result = proxy_model.search_result(found)
        plan = search_result.winner.plan
        console.print(f"{search_result.reason[0].upper()}{search_result.reason[1:]}.")
    if not worker.leads():
        return None
    plan = replace(plan, memory_options=memory_options or plan.memory_options)
    account = planner.accountant.account(plan)
    said = None
    if search_result is not None:
        said = verdict(search_result, adam_requirement(planner), job.max_steps)
        pictures = write_report(
            folder.tuning,
            search_result,
            said,
            account,
            planner.accountant.account(planner.uniform(0)),
            budget_bytes,
        )
    rehearsed = rehearse(
        job,
        plan,
        folder,
        predicted_bytes=account.peak_bytes,
        budget_bytes=budget_bytes,
    )
    console.print(
        plan_table(plan, account, budget_bytes, None, option_costs=planner.option_costs(plan))
    )
    console.print(
        f"rehearsal: {rehearsed}, {format_bytes(account.peak_bytes)} predicted", highlight=False
    )
    plan.save(folder.plan)
    if said is not None:
        console.print(said, highlight=False)
    return Tuned(plan, account, search_result, pictures)


def _proxy_model(console: Console, job: Job, planner: BudgetPlanner) -> ProxyModel | None:
    """Find what to search on where Adam, which all is compared with, does not fit."""
    if planner.adam_may_win:
        return None
    lacking = f"Adam does not fit {ByteSize(planner.budget_bytes)}"
    try:
        proxy_model = ProxyModel(job, planner)
    except NoProxyModelError as error:
        console.print(f"{lacking}, and there is no proxy model: {error}", highlight=False)
        return None
    console.print(f"{lacking}: tuning on {proxy_model}", highlight=False)
    return proxy_model


def _search(
    console: Console,
    job: Job,
    planner: BudgetPlanner,
    folder: RunFolder,
    search_budget: SearchBudget,
    worker: Worker,
    memory_options: MemoryOptions | None,
) -> SearchResult:
    known = load_earlier_trials(folder.others("tuning/study.db"), job_key(job))
    seconds = TrialRunner(job, memory_options=memory_options).seconds_per_step(
        planner.uniform(planner.uniform_levels[-1])
    )
    console.print(_announcement(search_budget, job.max_steps, seconds), highlight=False)
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tuning", total=search_budget.max_steps_total)

        def on_steps(count: int) -> None:
            progress.advance(task, count)

        def on_run(description: str, loss: float) -> None:
            console.print(f"  {description:<48} loss {loss:.4f}", highlight=False)

        return search(
            job,
            planner,
            folder.tuning,
            search_budget,
            memory_options=memory_options,
            known=known,
            worker=worker,
            on_steps=on_steps,
            on_run=on_run,
        )


def _announcement(search_budget: SearchBudget, max_steps: int, seconds: float) -> str:
    most = search_budget.max_steps_total
    return (
        f"search: {search_budget.num_trials} short runs of {search_budget.steps} steps, then a "
        "race of up to "
        f"{MAX_FINALISTS} plans over {search_budget.num_seeds} seeds, {search_budget.final_steps} "
        "steps each; "
        f"at most {most} steps, {most / max_steps:.1%} of the full run's {max_steps}; about "
        f"{_duration(most * seconds)} at {seconds:.3g} s a step"
    )


def _too_little(options: TuneOptions, max_steps: int) -> str:
    least = SMALLEST_SEARCH.max_steps_total
    return (
        f"not tuned: tune.fraction {options.fraction:g} of {max_steps} steps is "
        f"{options.fraction * max_steps:.0f}, and the least search takes {least}; "
        f"--tune.fraction {math.ceil(1000 * least / max_steps) / 1000:g} pays for it"
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def fit(
    job: Job,
    planner: BudgetPlanner,
    folder: RunFolder,
    options: TuneOptions,
    *,
    settings: str,
    plan: FoldPlan | None = None,
    memory_options: MemoryOptions | None = None,
    ckpt_path: Path | None = None,
) -> dict[str, Any] | None:
    """Do a whole run, from the plan to the exported model.

    Calling it again on the same folder takes up where it was left.

    Args:
        job: What to train.
        planner: Its plans that fit the memory of one device.
        folder: Gets everything that the run writes.
        options: How much to search.
        settings: The resolved configuration as text.
        plan: What to train by; without one it is tuned.
        memory_options: What a tuned plan runs with where memory ran out before; see `tune`.
        ckpt_path: Where to begin while the folder has no checkpoint of its own.

    Returns:
        The figures of `summary.json`; None where another worker on the search has the lead, which
        goes on alone, or has ended the run already.

    Raises:
        InfeasibleBudgetError: No plan fits.
        MemoryShortageError: A run needs more than was predicted, and more than there is.
        CheckpointError: The checkpoint cannot be read, or is of another plan.
        BusyError: Another process trains in the folder.
    """
    if plan is not None:
        with folder.held():
            plan.save(folder.plan)
            return _train(job, planner, folder, plan, None, settings, ckpt_path)
    with folder.held():  # or else say so now, and not after the search
        pass
    with Worker(folder.tuning, "fit", print) as worker:
        tuned = tune(job, planner, folder, options, worker=worker, memory_options=memory_options)
        if tuned is None:
            return None
        with folder.held():
            if folder.summary.exists():  # the one that had the lead was quicker than this looked
                Console(soft_wrap=True).print(f"{folder.path} is finished", highlight=False)
                return None
            return _train(job, planner, folder, tuned.plan, tuned, settings, ckpt_path)


def _train(
    job: Job,
    planner: BudgetPlanner,
    folder: RunFolder,
    plan: FoldPlan,
    tuned: Tuned | None,
    settings: str,
    ckpt_path: Path | None,
) -> dict[str, Any]:
    folder.name_plan(settings)
    predicted = planner.accountant.account(plan).peak_bytes if job.is_foam else None
    beside = "" if predicted is None else f", predicted peak {format_bytes(predicted)}"
    Console(soft_wrap=True).print(
        f"training {job.max_steps} steps in {folder.path}{beside}", highlight=False
    )
    trained = train(
        job,
        plan,
        folder,
        predicted_bytes=predicted,
        # Without a budget there is the whole address space.
        budget_bytes=planner.budget_bytes if planner.budget_bytes < sys.maxsize else None,
        pictures=tuned.pictures if tuned else None,
        ckpt_path=ckpt_path,
    )
    fallback = Fallback.load(folder.fallback)
    summary = {
        **_figures(predicted, tuned, trained),
        "proxy_model": plan.proxy_model,
        "skipped_steps": trained.skipped_steps,
        "rollbacks": trained.rollbacks,
        "fallbacks": len(fallback.events) if fallback else 0,
        "versions": versions(),
        "seed": job.seed,
    }
    write_json(folder.summary, summary)
    return summary


def _figures(predicted: int | None, tuned: Tuned | None, trained: Trained) -> dict[str, Any]:
    search_result = tuned.search_result if tuned else None
    return {
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": trained.measured_peak_bytes,
        "reference_loss": search_result.loss_of("reference") if search_result else None,
        "tuned_loss": search_result.winner.loss if search_result else None,
        "uniform_loss": search_result.loss_of("uniform") if search_result else None,
        "final_validation_loss": trained.final_validation_loss,
        "validation_tokens": trained.validation_tokens,
        "tokens_per_second": trained.tokens_per_second,
    }
