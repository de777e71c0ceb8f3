"""The command `compare`: optimizers side by side, with its progress and its files."""

import math
from pathlib import Path

from rich.console import Console

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from tuner.comparison.compare import MAX_RATES, MIN_RATES, CompareOptions, Comparison, compare
from tuner.comparison.profile import num_profile_steps
from tuner.comparison.report import compare_table, write_comparison
from tuner.config.parser import Settings
from tuner.console import say, step_progress
from tuner.run_context import save_traceback


def run_comparison(job: Job, options: CompareOptions, folder: Path, *, command: str) -> Comparison:
    """Compare, and write `compare.md`, `compare.png` and `runs.json`.

    Args:
        job: What to train.
        options: What to compare.
        folder: Gets the files; the same command resumes from them.
        command: The command line, for the report.

    Raises:
        ConfigError: The folder cannot be written.
        MemoryShortageError: The device has not enough memory.
    """
    job.check_weights()
    job.new_data(job.memory_options).setup()  # refuses bad data before the first run
    measured = num_profile_steps(len(options.optimizers))
    say(
        f"compare: {', '.join(options.optimizers)}\n"
        f"  {options.min_runs} runs of {options.steps} steps, and {measured} steps to measure "
        "memory and speed\n"
        f"  up to {MAX_RATES - MIN_RATES} more runs for an optimizer whose best learning rate is "
        "the lowest or highest tried\n"
        f"  folder: {folder}"
    )
    steps = options.min_runs * options.steps + measured
    with step_progress("comparing", steps) as progress:
        (task,) = progress.task_ids

        def on_added_run() -> None:
            progress.update(task, total=(progress.tasks[0].total or 0) + options.steps)

        def on_run(description: str, loss: float) -> None:
            result = f"loss {loss:.4f}" if math.isfinite(loss) else "diverged   "
            say(f"  {result}  {description}", console=progress.console)

        found = compare(
            job,
            options,
            folder,
            on_steps=lambda count: progress.advance(task, count),
            on_added_run=on_added_run,
            on_run=on_run,
        )
    written = write_comparison(found, folder, command=command, seed=job.seed)
    Console(soft_wrap=True).print(compare_table(found))
    for path in written:
        say(f"wrote {path}")
    return found


def run_compare(settings: Settings) -> None:
    """Compare optimizers on the job of the settings."""
    if settings.memory_budget is not None or settings.fold_plan is not None:
        raise ConfigError(
            "compare runs every optimizer as configured; remove --memory-budget and --fold-plan"
        )
    options = CompareOptions.parse(settings.optimizers, settings.steps, settings.seeds)
    folder = Path(settings.runs) / settings.name / "compare"
    with save_traceback(folder):
        run_comparison(settings.job(), options, folder, command=settings.command)
