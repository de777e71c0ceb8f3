"""The command `tune`: everything up to and including the rehearsal."""

from foam_lightning.errors import ConfigError
from tuner.commands.fit import calibrate_gpu, find_unfinished, open_folder
from tuner.config.parser import Settings
from tuner.oom_fallback import load_fallback_options, memory_fallback
from tuner.pipeline import tune
from tuner.planning.planner import BudgetPlanner
from tuner.trials.workers import Worker


def run_tune(settings: Settings) -> None:
    """Find a plan, and rehearse it."""
    job = settings.job()
    if settings.memory_budget is None:
        raise ConfigError("tune needs --memory-budget SIZE, such as 24GB")
    if job.devices.shards:
        raise ConfigError(
            "tune trains the whole model in one process; tune with --trainer.devices 1 and a "
            "budget that holds it, then share it: fit --fold-plan FILE"
        )
    calibrate_gpu(job)
    planner = BudgetPlanner(job, settings.memory_budget)
    planner.check_feasible()
    memory_options = load_fallback_options(find_unfinished(settings))
    folder = open_folder(settings, job)
    with memory_fallback(planner, folder), Worker(folder.tuning, "tune", print) as worker:
        tuned = tune(
            job, planner, folder, settings.tune, worker=worker, memory_options=memory_options
        )
        if tuned is None:  # another worker goes on
            return
        folder.name_plan(settings.text)
    reason = tuned.search_result.reason if tuned.search_result else "not tuned"
    print(f"plan    {folder.plan}: {reason}")
    if tuned.search_result:
        print(f"report  {folder.tuning / 'report.md'}")
    print("next    the same command with fit instead of tune")
