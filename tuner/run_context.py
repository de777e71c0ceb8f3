"""What every step of a run needs, and how a command opens the folder of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import format_exception

from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import FoamError, UnexpectedError, as_storage_error
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.storage.atomic import atomic_path, write_text
from foam_lightning.storage.run_folder import RunFolder
from tuner.config.parser import Settings
from tuner.console import say
from tuner.oom_fallback import Fallback
from tuner.planning.planner import BudgetPlanner
from tuner.trials.budget import TuneOptions
from tuner.trials.workers import Worker


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One run: what to train, within which budget, and where.

    Attributes:
        job: What to train.
        planner: Plans of the job that fit the budget of one device.
        folder: Gets every file of the run.
        tune_options: How much to search.
        settings_text: The resolved configuration.
        worker: This process among those that share the search; None where nothing is searched.
        memory_options: Replaces the memory options of a tuned plan after memory ran out. The search
            still chooses among the levels that fit with the original ones, so that finished trials
            count and the memory that these save is not spent again.
        ckpt_path: Where to start while the folder has no checkpoint of its own.
    """

    job: Job
    planner: BudgetPlanner
    folder: RunFolder
    tune_options: TuneOptions
    settings_text: str = ""
    worker: Worker | None = None
    memory_options: MemoryOptions | None = None
    ckpt_path: Path | None = None

    @property
    def budget_bytes(self) -> int:
        """The budget of one device; only a run with one is tuned and rehearsed."""
        assert self.planner.budget_bytes is not None
        return self.planner.budget_bytes

    def with_memory_options(self, plan: FoldPlan) -> FoldPlan:
        """Return the plan with the memory options that the run falls back to, if there are any."""
        return replace(plan, memory_options=self.memory_options or plan.memory_options)


def open_run_folder(settings: Settings, job: Job) -> RunFolder:
    """Open the run folder, after the last check of anything that the user gave, and name it.

    Raises:
        FoamError: Weights, trainer settings or data are wrong, or the folder cannot be written.
    """
    job.check_weights()
    job.check_trainer()
    job.new_data(job.memory_options).setup()
    folder = RunFolder.open(Path(settings.runs), settings.name, settings.identity)
    if not folder.plan.exists():
        write_text(folder.config, settings.text)
    say(f"run folder: {folder.path}")
    length, declared = job.data.sequence_length, settings.model.max_position_embeddings
    if job.model.pretrained is not None:
        declared = job.new_module().llama_config().max_position_embeddings
    if length > declared:
        say(
            f"rows of {length} tokens exceed the {declared} positions of the model "
            f"(max_position_embeddings); the exported model will declare {length}"
        )
    return folder


@contextmanager
def save_traceback(folder: Path) -> Iterator[None]:
    """Write the traceback of an unexpected error into a folder, and name it in the one line.

    Args:
        folder: Exists; gets `traceback.txt`, or `traceback_<rank>.txt` of another rank than 0.

    Raises:
        UnexpectedError: Something raised an error that is neither ours nor of a disk or worker.
    """
    try:
        yield
    except FoamError:
        raise
    except Exception as error:
        if as_storage_error(error) is not None:
            raise
        rank = "" if is_first_process() else f"_{os.environ.get('RANK', os.getpid())}"
        path = folder / f"traceback{rank}.txt"
        try:
            with atomic_path(path) as temporary:  # not `write_text`: any rank may fail
                temporary.write_text("".join(format_exception(error)), encoding="utf-8")
        except OSError:  # then only --debug shows it
            raise error from None
        raise UnexpectedError.from_error(error, path) from error


def find_unfinished_run(settings: Settings) -> RunFolder | None:
    """Find the run that the command resumes; None if it starts a new one. Writes nothing."""
    return RunFolder.find_unfinished(Path(settings.runs), settings.name, settings.identity)


def load_fallback(folder: RunFolder | None) -> MemoryOptions | None:
    """Return, and print, the memory options that a run fell back to; None if it never did.

    Args:
        folder: The run that the command resumes; None if it starts a new one.

    Raises:
        PlanError: The record is damaged.
    """
    fallback = Fallback.load(folder.fallback) if folder else None
    if fallback is None:
        return None
    say(str(fallback))
    return fallback.memory_options
