"""The command `fit`: plan, tune, rehearse, train and export."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.resume import (
    ResumedPlan,
    describe_other_text,
    load_plan,
    resume_plan,
    use_checkpoint_architecture,
    use_checkpoint_tokenizer,
)
from foam_lightning.storage.paths import exists
from tuner.config.parser import Settings
from tuner.console import say
from tuner.oom_fallback import fall_back_when_out_of_memory
from tuner.pipeline import fit
from tuner.planning.planner import BudgetPlanner
from tuner.report.final_screen import final_screen
from tuner.run_context import (
    RunContext,
    RunStart,
    find_start,
    load_fallback,
    open_run_folder,
    save_traceback,
)
from tuner.trials.workers import Worker


def run_fit(settings: Settings) -> None:
    """Plan, tune, rehearse, train and export."""
    start = find_start(settings, extends=True)
    if start is None:
        return
    job = use_checkpoint_architecture(settings.job(), start.checkpoints)
    resumed = _resume(settings, job, start)
    data, pretrained = job.data, job.model.pretrained
    job = use_checkpoint_tokenizer(job, start.checkpoints).with_steps()
    if pretrained is not None and not exists(Path(pretrained)):
        data = job.data  # its tokenizer is gone too
    if start.checkpoint is not None and resumed is not None:
        _describe_start(job, start.checkpoint, resumed)
    job.calibrate_gpu()
    planner = BudgetPlanner(job, settings.memory_budget)
    memory_options = load_fallback(start.folder)
    plan = resumed.plan if resumed is not None else _given_plan(settings, job, start)
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
    folder = open_run_folder(settings, job, start)
    joined = nullcontext() if plan is not None else Worker(folder.tuning, "fit", say)
    with (
        save_traceback(folder.path),
        fall_back_when_out_of_memory(planner, folder),
        joined as worker,
    ):
        context = RunContext(
            job=replace(job, data=data),
            resumed_job=job,
            planner=planner,
            folder=folder,
            tune_options=settings.tune,
            settings_text=settings.text,
            worker=worker,
            memory_options=memory_options,
            ckpt_path=start.checkpoint,
        )
        summary = fit(context, plan)
    if summary is not None:
        say(final_screen(folder, summary), wrap=False)


def _resume(settings: Settings, job: Job, start: RunStart) -> ResumedPlan | None:
    """Load the plan of the checkpoint of another run, unless this run has its own already."""
    if start.checkpoint is None or start.has_checkpoint:
        return None
    is_budgeted = settings.memory_budget is not None
    resumed = resume_plan(job, start.checkpoint, settings.fold_plan, is_budgeted=is_budgeted)
    if job.trainer.max_steps > 0:  # epochs can only end the run earlier
        resumed.check_steps_left(start.checkpoint, job.trainer.max_steps)
    return resumed


def _describe_start(job: Job, checkpoint: Path, resumed: ResumedPlan) -> None:
    """Say what goes on from where, and with what that is other than before."""
    # `_resume` has refused a checkpoint past trainer.max_steps, so only epochs can end it here.
    resumed.check_steps_left(checkpoint, job.trainer.max_steps, ended_by_epochs=True)
    text = f"going on from {checkpoint}, step {resumed.step} of {job.trainer.max_steps}"
    say(f"{text}, with {', '.join(resumed.changes)}" if resumed.changes else text)
    if other := describe_other_text(job, checkpoint):
        say(other)


def _given_plan(settings: Settings, job: Job, start: RunStart) -> FoldPlan | None:
    """Return the plan that needs no search; None if one is searched for."""
    if start.checkpoint is not None and start.folder is not None:  # the run began with it
        return load_plan(job, str(start.folder.plan))
    if settings.fold_plan is not None:
        return load_plan(job, settings.fold_plan)
    return job.configured_plan() if settings.memory_budget is None else None
