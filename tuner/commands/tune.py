"""The command `tune`: everything up to and including the rehearsal."""

from foam_lightning.errors import ConfigError
from tuner.config.parser import Settings
from tuner.console import say
from tuner.oom_fallback import fall_back_when_out_of_memory
from tuner.pipeline import tune
from tuner.planning.planner import BudgetPlanner
from tuner.run_context import (
    RunContext,
    find_start,
    load_fallback,
    open_run_folder,
    save_traceback,
)
from tuner.trials.workers import Worker


def run_tune(settings: Settings) -> None:
    """Find a plan, and rehearse it."""
    start = find_start(settings)
    if start is None:
        return
    job = settings.job()
    if settings.memory_budget is None:
        raise ConfigError("tune needs --memory-budget SIZE, such as 24GB")
    if job.devices.shards:
        raise ConfigError(
            "tune trains the whole model in one process; tune with --trainer.devices 1 and a "
            "budget that holds it, then share it: fit --fold-plan FILE"
        )
    job = job.with_steps()
    job.calibrate_gpu()
    planner = BudgetPlanner(job, settings.memory_budget)
    planner.check_feasible()
    memory_options = load_fallback(start.folder)
    folder = open_run_folder(settings, job, start)
    with (
        save_traceback(folder.path),
        fall_back_when_out_of_memory(planner, folder),
        Worker(folder.tuning, "tune", say) as worker,
    ):
        context = RunContext(
            job=job,
            planner=planner,
            folder=folder,
            tune_options=settings.tune,
            settings_text=settings.text,
            worker=worker,
            memory_options=memory_options,
        )
        tuned = tune(context)
        if tuned is None:  # another worker continues
            return
        folder.write_config(settings.text)
    say(f"plan    {folder.plan}")
    if tuned.search_result:
        say(f"report  {folder.tuning / 'report.md'}")
    say("next    run the same command with fit instead of tune")
