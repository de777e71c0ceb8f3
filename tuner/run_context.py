"""What every step of a run needs, and how a command opens the folder of a run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import format_exception

from foam_lightning.checkpoint.io import previous_checkpoint
from foam_lightning.data.saved import peek_checkpoint
from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import FoamError, UnexpectedError, as_storage_error
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.settings import TrainerSettings
from foam_lightning.storage.atomic import atomic_path, write_text
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.storage.run_identity import RunIdentity
from tuner.config.identity import ENDS, run_identity
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
        job: What to train, as the settings say, so that finished trials count.
        planner: Plans of the job that fit the budget of one device.
        folder: Gets every file of the run.
        tune_options: How much to search.
        settings_text: The resolved configuration.
        worker: This process among those that share the search; None where nothing is searched.
        memory_options: Replaces the memory options of a tuned plan after memory ran out. The search
            still chooses among the levels that fit with the original ones, so that finished trials
            count and the memory that these save is not spent again.
        resumed_job: The same job with the tokenizer of a checkpoint, for the full run; None if that
            starts from none.
        ckpt_path: Where to start while the folder has no checkpoint of its own.
    """

    job: Job
    planner: BudgetPlanner
    folder: RunFolder
    tune_options: TuneOptions
    settings_text: str = ""
    worker: Worker | None = None
    memory_options: MemoryOptions | None = None
    resumed_job: Job | None = None
    ckpt_path: Path | None = None

    @property
    def budget_bytes(self) -> int:
        """The budget of one device; only a run with one is tuned and rehearsed."""
        assert self.planner.budget_bytes is not None
        return self.planner.budget_bytes

    def with_memory_options(self, plan: FoldPlan) -> FoldPlan:
        """Return the plan with the memory options that the run falls back to, if there are any."""
        return replace(plan, memory_options=self.memory_options or plan.memory_options)


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """Where the run of a command begins.

    Attributes:
        identity: What identifies it.
        folder: The unfinished version that it goes on with; None if it begins a new one.
        checkpoint: The checkpoint of another run to start from while the folder has none of its
            own; None if it starts from none.
    """

    identity: RunIdentity
    folder: RunFolder | None = None
    checkpoint: Path | None = None

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has a checkpoint of its own."""
        return self.folder is not None and count_steps(self.folder) is not None

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints to look for, the one to prefer first."""
        own = None if self.folder is None else self.folder.last_checkpoint
        return [path for path in (own, self.checkpoint) if path is not None]


def find_start(settings: Settings, *, extends: bool = False) -> RunStart | None:
    """Find the run that a command goes on with; writes nothing.

    Args:
        settings: Of the command.
        extends: Also go on from the end of a finished run that only ends earlier.

    Returns:
        None if the run is finished, which is printed.
    """
    root, name, identity = Path(settings.runs), settings.name, run_identity(settings)
    given = settings.values.get("ckpt_path")
    start = None if given is None else Path(given)
    unfinished = RunFolder.find_unfinished(root, name, identity)
    if unfinished is not None:
        start = start or unfinished.start
        return RunStart(identity=identity, folder=unfinished, checkpoint=start)
    finished = RunFolder.find_finished(root, name, identity)
    if finished:
        say(_finished_message(finished[0], settings.job().trainer))
        return None
    if start is None and extends:
        shorter = RunFolder.find_finished(root, name, identity, ignoring=ENDS)
        start = _find_extended(settings, shorter)
    return RunStart(identity=identity, checkpoint=start)


def _find_extended(settings: Settings, finished: Sequence[RunFolder]) -> Path | None:
    """Find the checkpoint of the finished run that ended last before the end of this one."""
    if not finished:
        return None
    max_steps = settings.job().with_steps().trainer.max_steps
    steps = {run: step for run in finished if (step := count_steps(run)) is not None}
    run = max((run for run in steps if steps[run] < max_steps), key=steps.__getitem__, default=None)
    if run is None:
        return None
    say(
        f"extending {run.path} from step {steps[run]} to {max_steps}; to begin at step 0 instead, "
        "choose another --name"
    )
    return run.last_checkpoint


def _finished_message(run: RunFolder, trainer: TrainerSettings) -> str:
    step = count_steps(run)
    text = f"{run.path} is finished" + ("" if step is None else f" at step {step}")
    raised = "max_steps" if step is None else f"max_steps above {step}"
    ends_first = trainer.max_steps < 1 or (step is not None and step < trainer.max_steps)
    if trainer.max_epochs is not None and ends_first:
        raised = "max_epochs"
    return (
        f"{text}, its results are in {run.summary.name}; to train on, raise --trainer.{raised}, "
        "and to run it again, choose another --name"
    )


def count_steps(run: RunFolder) -> int | None:
    """Return the optimizer steps of the last checkpoint of a run; None if it has none."""
    for path in (run.last_checkpoint, previous_checkpoint(run.last_checkpoint)):
        step = (peek_checkpoint(path) or {}).get("global_step")
        if isinstance(step, int):
            return step
    return None


def open_run_folder(settings: Settings, job: Job, start: RunStart) -> RunFolder:
    """Open the run folder, after the last check of anything that the user gave, and name it.

    Raises:
        FoamError: Weights, trainer settings or data are wrong, or the folder cannot be written.
    """
    job.check_weights()
    job.check_tokenizer()
    job.check_trainer()
    job.new_data(job.memory_options).setup()
    folder = RunFolder.open(
        Path(settings.runs), settings.name, start.identity, start=start.checkpoint
    )
    if not folder.plan.exists():
        write_text(folder.config, settings.text)
    if start.folder is None:
        say(f"run folder: {folder.path}")
        _name_other_run(folder, start.identity)
    else:
        _name_run(folder, start.identity, job.trainer.max_steps)
    length, declared = job.data.sequence_length, settings.model.max_position_embeddings
    if job.model.pretrained is not None:
        declared = job.new_module().llama_config().max_position_embeddings
    if length > declared:
        say(
            f"rows of {length} tokens exceed the {declared} positions of the model "
            f"(max_position_embeddings); the exported model will declare {length}"
        )
    return folder


def _name_run(folder: RunFolder, identity: RunIdentity, max_steps: int) -> None:
    """Say which run goes on, and from where."""
    step = count_steps(folder)
    where = "which has no checkpoint yet" if step is None else f"at step {step} of {max_steps}"
    say(f"going on with {folder.path}, {where}")
    if changed := folder.differences(identity, by_path=False):
        say(f"the contents of {', '.join(changed)} have changed since it began")


def _name_other_run(folder: RunFolder, identity: RunIdentity) -> None:
    """Say why a new run begins although the newest one before it is unfinished."""
    others = RunFolder.versions(folder.path.parent.parent, folder.path.parent.name)
    newest = next((run for run in others if run != folder), None)
    if newest is None or newest.is_finished or (step := count_steps(newest)) is None:
        return
    if names := newest.differences(identity):
        say(
            f"{newest.path}, unfinished at step {step}, has another {', '.join(names)}; to go on "
            f"from it with these settings, add --ckpt_path {newest.last_checkpoint}"
        )


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
