"""fit(): tune, unless there is a plan, then train and sum up."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.run_folder import RunFolder, write_json
from foam_lightning.training import Trained, train, versions
from foam_lightning.units import in_words
from tuner.effort import TuneOptions
from tuner.fitting import Fitting
from tuner.guard import Fallback
from tuner.run import Tuned, tune
from tuner.workers import Worker


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
