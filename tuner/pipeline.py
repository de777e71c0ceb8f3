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
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.storage.run_folder import RunFolder, write_json
from foam_lightning.training import Trained, train, versions
from foam_lightning.units import ByteSize, in_words
from tuner.oom_fallback import Fallback
from tuner.planning.planner import Fitting
from tuner.rehearsal import rehearse
from tuner.report.plan_table import plan_table
from tuner.report.report import write_report
from tuner.report.verdict import adams_need, verdict
from tuner.search.proxy_model import NoTwinError, Twin
from tuner.search.search import search
from tuner.trials.budget import LEAST, MOST_FINALISTS, Effort, TuneOptions
from tuner.trials.cache import job_key, known_of
from tuner.trials.results import Outcome
from tuner.trials.runner import Bench
from tuner.trials.workers import Worker


@dataclass(frozen=True)
class Tuned:
    """The plan for the full run, and what it rests on.

    Attributes:
        plan: The plan.
        account: Its predicted peak.
        outcome: What the search found; None where there was too little time for any.
        pictures: PNG files of plan and search, by title.
    """

    plan: FoldPlan
    account: Account
    outcome: Outcome | None
    pictures: Mapping[str, Path]


def tune(
    job: Job,
    fitting: Fitting,
    folder: RunFolder,
    options: TuneOptions,
    *,
    worker: Worker | None = None,
    levers: Levers | None = None,
) -> Tuned | None:
    """Find the plan for a budget, prove it on two real steps, and write it down.

    Calling it again on the same folder takes up where it was left.

    Args:
        job: What to train.
        fitting: Its plans that fit the memory of one device.
        folder: Gets `fold_plan.json` and `tuning/`.
        options: How much to search.
        worker: Who works on the search here; by default one that no other worker waits for.
        levers: What to run with where memory ran out with the levers that the account chose. What
            is searched stays as it was: the levels that fit with those, so that finished trials
            count, and the memory that these save is not spent again.

    Returns:
        What was found; None where another worker has the lead, which goes on alone.

    Raises:
        InfeasibleBudgetError: No plan fits.
        MemoryShortageError: A run needs more than was predicted, and more than there is.
    """
    worker = worker or Worker(folder.tuning, "tune")
    console = Console(soft_wrap=True)
    budget_bytes = fitting.budget_bytes
    levels = fitting.uniform_levels
    console.print(
        f"run folder {folder.path}; uniform levels that fit {ByteSize(budget_bytes)}: "
        f"{levels[0]} to {levels[-1]}"
    )
    effort = Effort.of(options, job.max_steps)
    pictures: Mapping[str, Path] = {}
    if effort is None:
        outcome, plan = None, fitting.untuned()
        console.print(_too_little(options, job.max_steps), highlight=False)
    else:
        twin = _twin(console, job, fitting)
        if twin is None:
            outcome = _search(console, job, fitting, folder, effort, worker, levers)
        else:
            found = _search(console, twin.job, twin.fitting, folder, effort, worker, levers)
            outcome = twin.outcome(found)
        plan = outcome.winner.plan
        console.print(f"{outcome.reason[0].upper()}{outcome.reason[1:]}.")
    if not worker.leads():
        return None
    plan = replace(plan, levers=levers or plan.levers)
    account = fitting.accountant.account(plan)
    said = None
    if outcome is not None:
        said = verdict(outcome, adams_need(fitting), job.max_steps)
        pictures = write_report(
            folder.tuning,
            outcome,
            said,
            account,
            fitting.accountant.account(fitting.uniform(0)),
            budget_bytes,
        )
    rehearsed = rehearse(
        job,
        plan,
        folder,
        predicted_bytes=account.peak_bytes,
        budget_bytes=budget_bytes,
    )
    console.print(plan_table(plan, account, budget_bytes, None, prices=fitting.prices(plan)))
    console.print(
        f"rehearsal: {rehearsed}, {in_words(account.peak_bytes)} predicted", highlight=False
    )
    plan.save(folder.plan)
    if said is not None:
        console.print(said, highlight=False)
    return Tuned(plan, account, outcome, pictures)


def _twin(console: Console, job: Job, fitting: Fitting) -> Twin | None:
    """Find what to search on where Adam, which all is compared with, does not fit."""
    if fitting.adam_fits:
        return None
    lacking = f"Adam does not fit {ByteSize(fitting.budget_bytes)}"
    try:
        twin = Twin(job, fitting)
    except NoTwinError as error:
        console.print(f"{lacking}, and there is no twin: {error}", highlight=False)
        return None
    console.print(f"{lacking}: tuning on {twin}", highlight=False)
    return twin


def _search(
    console: Console,
    job: Job,
    fitting: Fitting,
    folder: RunFolder,
    effort: Effort,
    worker: Worker,
    levers: Levers | None,
) -> Outcome:
    known = known_of(folder.others("tuning/study.db"), job_key(job))
    seconds = Bench(job, levers=levers).seconds_per_step(
        fitting.uniform(fitting.uniform_levels[-1])
    )
    console.print(_announcement(effort, job.max_steps, seconds), highlight=False)
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tuning", total=effort.most_steps)

        def on_steps(count: int) -> None:
            progress.advance(task, count)

        def on_run(description: str, loss: float) -> None:
            console.print(f"  {description:<48} loss {loss:.4f}", highlight=False)

        return search(
            job,
            fitting,
            folder.tuning,
            effort,
            levers=levers,
            known=known,
            worker=worker,
            on_steps=on_steps,
            on_run=on_run,
        )


def _announcement(effort: Effort, max_steps: int, seconds: float) -> str:
    most = effort.most_steps
    return (
        f"search: {effort.num_trials} short runs of {effort.steps} steps, then a race of up to "
        f"{MOST_FINALISTS} plans over {effort.num_seeds} seeds, {effort.final_steps} steps each; "
        f"at most {most} steps, {most / max_steps:.1%} of the full run's {max_steps}; about "
        f"{_duration(most * seconds)} at {seconds:.3g} s a step"
    )


def _too_little(options: TuneOptions, max_steps: int) -> str:
    least = LEAST.most_steps
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
    fitting: Fitting,
    folder: RunFolder,
    options: TuneOptions,
    *,
    settings: str,
    plan: FoldPlan | None = None,
    levers: Levers | None = None,
    ckpt_path: Path | None = None,
) -> dict[str, Any] | None:
    """Do a whole run, from the plan to the exported model.

    Calling it again on the same folder takes up where it was left.

    Args:
        job: What to train.
        fitting: Its plans that fit the memory of one device.
        folder: Gets everything that the run writes.
        options: How much to search.
        settings: The resolved configuration as text.
        plan: What to train by; without one it is tuned.
        levers: What a tuned plan runs with where memory ran out before; see `tune`.
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
            return _train(job, fitting, folder, plan, None, settings, ckpt_path)
    with folder.held():  # or else say so now, and not after the search
        pass
    with Worker(folder.tuning, "fit", print) as worker:
        tuned = tune(job, fitting, folder, options, worker=worker, levers=levers)
        if tuned is None:
            return None
        with folder.held():
            if folder.summary.exists():  # the one that had the lead was quicker than this looked
                Console(soft_wrap=True).print(f"{folder.path} is finished", highlight=False)
                return None
            return _train(job, fitting, folder, tuned.plan, tuned, settings, ckpt_path)


def _train(
    job: Job,
    fitting: Fitting,
    folder: RunFolder,
    plan: FoldPlan,
    tuned: Tuned | None,
    settings: str,
    ckpt_path: Path | None,
) -> dict[str, Any]:
    folder.name_plan(settings)
    predicted = fitting.accountant.account(plan).peak_bytes if job.is_foam else None
    beside = "" if predicted is None else f", predicted peak {in_words(predicted)}"
    Console(soft_wrap=True).print(
        f"training {job.max_steps} steps in {folder.path}{beside}", highlight=False
    )
    trained = train(
        job,
        plan,
        folder,
        predicted_bytes=predicted,
        # Without a budget there is the whole address space.
        budget_bytes=fitting.budget_bytes if fitting.budget_bytes < sys.maxsize else None,
        pictures=tuned.pictures if tuned else None,
        ckpt_path=ckpt_path,
    )
    fallback = Fallback.load(folder.fallback)
    summary = {
        **_figures(predicted, tuned, trained),
        "twin": plan.twin,
        "skipped_steps": trained.skipped_steps,
        "rollbacks": trained.rollbacks,
        "fallbacks": len(fallback.events) if fallback else 0,
        "versions": versions(),
        "seed": job.seed,
    }
    write_json(folder.summary, summary)
    return summary


def _figures(predicted: int | None, tuned: Tuned | None, trained: Trained) -> dict[str, Any]:
    outcome = tuned.outcome if tuned else None
    return {
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": trained.measured_peak_bytes,
        "reference_loss": outcome.loss_of("reference") if outcome else None,
        "tuned_loss": outcome.winner.loss if outcome else None,
        "uniform_loss": outcome.loss_of("uniform") if outcome else None,
        "final_validation_loss": trained.final_validation_loss,
        "validation_tokens": trained.validation_tokens,
        "tokens_per_second": trained.tokens_per_second,
    }
