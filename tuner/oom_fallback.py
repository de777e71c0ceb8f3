"""The budget as a wall, and the way on when memory runs out: one lever more, in a fresh process."""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from foam_lightning.errors import ConfigError, FellBackError, PlanError
from foam_lightning.job import Job
from foam_lightning.memory.device import Gpu, MemoryShortageError, shortfall, wall
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import in_words
from tuner.planning.planner import Fitting

# Every fall-back starts the process anew; a run that needs more of them has another problem.
MOST_FALLBACKS = 8
_FIRST_OWN_FILE = 3  # after input, output and errors


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """What a run goes on with since memory ran out; `fallback.json` in its folder.

    Attributes:
        levers: What it trains with now, in place of its plan's.
        events: What happened, the first time first: when, where, step, reason, predicted and
            taken bytes, and the lever that was pulled.
    """

    levers: Levers
    events: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read it back; None if there is none.

        Raises:
            PlanError: The file is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(levers=Levers(**content["levers"]), events=tuple(content["events"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, PlanError) as error:
            raise PlanError(
                f"cannot read {path} ({type(error).__name__}); delete it to go on with the levers "
                "of the plan"
            ) from error

    def __str__(self) -> str:
        pulled = [name.replace("_", " ") for name, on in asdict(self.levers).items() if on is True]
        words = ", ".join([f"micro-batches of {_split(self.levers)}", *pulled])
        return f"memory ran out before ({len(self.events)}x); going on with {words}"


def fallen_to(folder: RunFolder | None) -> Levers | None:
    """Say, and give, what a run goes on with if memory ran out in it before; else None.

    Args:
        folder: The run that the command is about to continue; None if it starts another.

    Raises:
        PlanError: The record is damaged.
    """
    fallback = Fallback.load(folder.fallback) if folder else None
    if fallback is None:
        return None
    Console(soft_wrap=True).print(str(fallback), highlight=False)
    return fallback.levers


@contextmanager
def guarded(fitting: Fitting, folder: RunFolder) -> Iterator[None]:
    """Tune and train behind the wall of the budget, and fall back one lever at a shortage.

    Args:
        fitting: The plans of the job; its budget is the wall.
        folder: Gets `fallback.json`.

    Raises:
        FellBackError: Memory ran out; the same command goes on with less.
        MemoryShortageError: Memory ran out, and nothing is left to fall back to.
    """
    gpu, budget = fitting.job.gpu, fitting.budget_bytes
    try:
        with nullcontext() if gpu is None or budget == sys.maxsize else _walled(fitting, gpu):
            yield
    except MemoryShortageError as shortage:
        taken = gpu.usage().reserved + fitting.accountant.context if gpu is not None else None
        raise FellBackError(_fall_back(shortage, fitting, folder, taken)) from shortage


@contextmanager
def _walled(fitting: Fitting, gpu: Gpu) -> Iterator[None]:
    budget, outside = fitting.budget_bytes, fitting.accountant.context
    if warning := shortfall(gpu, budget, outside):
        Console(soft_wrap=True).print(warning, highlight=False)
    with wall(gpu, budget, outside):
        yield


def start_afresh() -> None:
    """Become a fresh process of the same command: after a shortage, memory is in no known state.

    Returns only where that cannot be: one of several processes cannot start on its own.
    """
    if "LOCAL_RANK" in os.environ:
        return
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    # The driver holds what this process took from the card for as long as its files are open.
    for number in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        if number >= _FIRST_OWN_FILE:
            with suppress(OSError):  # closed since, as the listing itself is
                os.set_inheritable(number, False)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fall_back(
    shortage: MemoryShortageError, fitting: Fitting, folder: RunFolder, taken_bytes: int | None
) -> str:
    """Write down the next rung of the ladder, and say it in one line."""
    plan = shortage.plan
    before = Fallback.load(folder.fallback)
    events = before.events if before else ()

    def peak(levers: Levers) -> int:
        if not _allows(fitting.job, levers):
            return sys.maxsize
        return fitting.accountant.account(replace(plan, levers=levers)).peak_bytes

    predicted = peak(plan.levers)
    figures = f"predicted {in_words(predicted)}" + (
        f", taken {in_words(taken_bytes)}" if taken_bytes is not None else ""
    )
    rung = None
    if len(events) < MOST_FALLBACKS:
        rung = fitting.ladder.next_rung(plan.levers, peak)
    if rung is None:
        fell = f" after {len(events)} fall-backs" if events else ""
        raise MemoryShortageError(
            shortage.where,
            plan,
            shortage.step,
            f"{shortage.reason} ({figures}); no lever is left{fell} that needs less: lower "
            "data.batch_size or data.sequence_length, choose a smaller model, or raise "
            "--memory-budget",
        )
    event = {
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "where": shortage.where,
        "step": shortage.step,
        "reason": shortage.reason,
        "predicted_peak_bytes": predicted,
        "taken_bytes": taken_bytes,
        "from": asdict(plan.levers),
        "to": asdict(rung),
    }
    # Not `write_json`: of several processes the one that ran out may not be the first.
    beside = folder.fallback.with_name(f"{folder.fallback.name}.{os.getpid()}.part")
    content = {"levers": asdict(rung), "events": [*events, event]}
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(folder.fallback)
    return f"{shortage} ({figures}); from here on {_pulled(plan, rung, fitting)}"


def _allows(job: Job, levers: Levers) -> bool:
    try:
        job.check(levers)
    except ConfigError:
        return False
    return True


def _pulled(before: FoldPlan, after: Levers, fitting: Fitting) -> str:
    """Say which levers change, and what those cost that are pulled now."""
    now, then = fitting.prices(replace(before, levers=after)), asdict(before.levers)
    changes = []
    for lever, value in asdict(after).items():
        if value == then[lever] or lever == "micro_batch_size":
            continue
        if lever == "accumulate_grad_batches":
            words = f"micro-batches of {_split(after)} instead of {_split(before.levers)}"
        else:
            words = lever.replace("_", " ") + ("" if value else " no more")
        changes.append(words + (f" (price: {now[lever]})" if value and lever in now else ""))
    return ", ".join(changes)


def _split(levers: Levers) -> str:
    return f"{levers.micro_batch_size} x {levers.accumulate_grad_batches}"
