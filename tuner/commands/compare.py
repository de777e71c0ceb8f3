"""The command `compare`: what it says while it runs, and where it leaves what it found."""

import math
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from tuner.comparison.compare import MOST_RATES, Comparison, Options, compare
from tuner.comparison.profile import num_steps
from tuner.comparison.report import compare_table, write_comparison
from tuner.config.parser import Settings


def run_comparison(job: Job, options: Options, folder: Path, *, command: str) -> Comparison:
    """Compare, and write `compare.md`, `compare.png` and `runs.json`.

    Args:
        job: What to train.
        options: What to compare.
        folder: Gets the files; the same command goes on from what it holds.
        command: What was typed.

    Raises:
        ConfigError: The folder cannot be written.
        MemoryShortageError: The device has not enough memory.
    """
    job.check_weights()
    job.new_data(job.memory_options).setup()  # refuses bad text before the first run
    console = Console(soft_wrap=True)
    measured = num_steps(len(options.optimizers))
    steps = options.least_runs * options.steps + measured
    console.print(
        f"compare: {', '.join(options.optimizers)}; {options.least_runs} runs of {options.steps} "
        f"steps, {steps} steps with those that measure, and up to {MOST_RATES - 4} runs more for "
        f"each whose best rate is at an edge; in {folder}",
        highlight=False,
    )
    columns = (
        TextColumn("comparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("comparing", total=steps)

        def on_extended() -> None:
            progress.update(task, total=(progress.tasks[0].total or 0) + options.steps)

        def on_run(description: str, loss: float) -> None:
            said = f"loss {loss:.4f}" if math.isfinite(loss) else "diverged"
            console.print(f"  {description:<40} {said}", highlight=False)

        found = compare(
            job,
            options,
            folder,
            on_steps=lambda count: progress.advance(task, count),
            on_extended=on_extended,
            on_run=on_run,
        )
    written = write_comparison(found, folder, command=command, seed=job.seed)
    console.print(compare_table(found))
    console.print(f"written {' and '.join(map(str, written))}", highlight=False)
    return found


def run_compare(settings: Settings) -> None:
    """Compare optimizers on the job of the settings."""
    if settings.memory_budget is not None or settings.fold_plan is not None:
        raise ConfigError(
            "compare runs every optimizer as configured; leave --memory-budget and --fold-plan out"
        )
    options = Options.of(settings.optimizers, settings.steps, settings.seeds)
    folder = Path(settings.runs) / settings.name / "compare"
    run_comparison(settings.job(), options, folder, command=settings.command)
