"""The command `fit`: plan, tune, rehearse, train and export."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.resume import (
    describe_other_text,
    load_plan,
    resume_plan,
    use_checkpoint_architecture,
    use_checkpoint_tokenizer,
)
from tuner.config.parser import Settings
from tuner.console import say
from tuner.oom_fallback import fall_back_when_out_of_memory
from tuner.pipeline import fit
from tuner.planning.planner import BudgetPlanner
from tuner.report.final_screen import final_screen
from tuner.run_context import (
    RunContext,
    find_unfinished_run,
    load_fallback,
    open_run_folder,
    save_traceback,
)
from tuner.trials.workers import Worker


def run_fit(settings: Settings) -> None:
    """Plan, tune, rehearse, train and export."""
    unfinished = find_unfinished_run(settings)
    start = None if settings.ckpt_path is None else Path(settings.ckpt_path)
    starts = [path for path in (unfinished and unfinished.last_checkpoint, start) if path]
    job = use_checkpoint_architecture(settings.job(), starts)
    plan = _given_plan(settings, job, start)
    job = use_checkpoint_tokenizer(job, starts)
    if start is not None and (other := describe_other_text(job, start)):
        say(other)
    job.calibrate_gpu()
    planner = BudgetPlanner(job, settings.memory_budget)
    memory_options = load_fallback(unfinished)
    if plan is None and settings.memory_budget is None:
        plan = job.configured_plan()
    if plan is None and job.devices.count > 1:
        raise ConfigError(
            "tune in one process first: python cli.py tune with the same options, then fit "
            "--fold-plan FILE"
        )
    if plan is None:
        planner.check_feasible()
    else:
        plan = replace(plan, memory_options=memory_options or plan.memory_options)
        planner.check(plan)
    folder = open_run_folder(settings, job)
    joined = nullcontext() if plan is not None else Worker(folder.tuning, "fit", say)
    with (
        save_traceback(folder.path),
        fall_back_when_out_of_memory(planner, folder),
        joined as worker,
    ):
        context = RunContext(
            job=job,
            planner=planner,
            folder=folder,
            tune_options=settings.tune,
            settings_text=settings.text,
            worker=worker,
            memory_options=memory_options,
            ckpt_path=start,
        )
        summary = fit(context, plan)
    if summary is not None:
        say(final_screen(folder, summary), wrap=False)


def _given_plan(settings: Settings, job: Job, start: Path | None) -> FoldPlan | None:
    """Load the plan of a checkpoint or of a file; None if neither is given."""
    if start is None:
        return None if settings.fold_plan is None else load_plan(job, settings.fold_plan)
    is_budgeted = settings.memory_budget is not None
    resumed = resume_plan(job, start, settings.fold_plan, is_budgeted=is_budgeted)
    text = f"going on from {start}, step {resumed.step} of {job.trainer.max_steps}"
    say(f"{text}, with {', '.join(resumed.changes)}" if resumed.changes else text)
    return resumed.plan
