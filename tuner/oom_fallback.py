"""A cap on memory at the budget, and the next memory option when memory runs out."""

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

from foam_lightning.errors import ConfigError, MemoryFallbackError, PlanError
from foam_lightning.job import Job
from foam_lightning.memory.device import (
    Gpu,
    MemoryShortageError,
    memory_cap,
    missing_memory_warning,
)
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.storage.atomic import atomic_path
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import format_bytes
from tuner.planning.planner import BudgetPlanner

# Every fall-back starts the process anew; a run that needs more of them has another problem.
MAX_FALLBACKS = 8
_FIRST_OWN_FILE = 3  # after input, output and errors


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """What a run goes on with since memory ran out; `fallback.json` in its folder.

    Attributes:
        memory_options: What it trains with now, in place of its plan's.
        events: What happened, the first time first: when, where, step, reason, predicted and
            taken bytes, and the memory option that was pulled.
    """

    memory_options: MemoryOptions
    events: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read it back; None if there is none.

        Raises:
            PlanError: The file is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                memory_options=MemoryOptions(**content["memory_options"]),
                events=tuple(content["events"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, PlanError) as error:
            raise PlanError(
                f"cannot read {path} ({type(error).__name__}); delete it to go on with the memory "
                "options of the plan"
            ) from error

    def __str__(self) -> str:
        pulled = [
            name.replace("_", " ") for name, on in asdict(self.memory_options).items() if on is True
        ]
        words = ", ".join([f"micro-batches of {_split(self.memory_options)}", *pulled])
        return f"memory ran out before ({len(self.events)}x); going on with {words}"


def load_fallback_options(folder: RunFolder | None) -> MemoryOptions | None:
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
    return fallback.memory_options


@contextmanager
def memory_fallback(planner: BudgetPlanner, folder: RunFolder) -> Iterator[None]:
    """Tune and train behind the wall of the budget, and fall back one memory option at a shortage.

    Args:
        planner: The plans of the job; its budget is the wall.
        folder: Gets `fallback.json`.

    Raises:
        MemoryFallbackError: Memory ran out; the same command goes on with less.
        MemoryShortageError: Memory ran out, and nothing is left to fall back to.
    """
    gpu, budget = planner.job.gpu, planner.budget_bytes
    try:
        with nullcontext() if gpu is None or budget == sys.maxsize else _capped(planner, gpu):
            yield
    except MemoryShortageError as shortage:
        taken = gpu.usage().reserved + planner.accountant.context if gpu is not None else None
        raise MemoryFallbackError(_fall_back(shortage, planner, folder, taken)) from shortage


@contextmanager
def _capped(planner: BudgetPlanner, gpu: Gpu) -> Iterator[None]:
    budget, outside = planner.budget_bytes, planner.accountant.context
    if warning := missing_memory_warning(gpu, budget, outside):
        Console(soft_wrap=True).print(warning, highlight=False)
    with memory_cap(gpu, budget, outside):
        yield


def restart_process() -> None:
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
    shortage: MemoryShortageError,
    planner: BudgetPlanner,
    folder: RunFolder,
    taken_bytes: int | None,
) -> str:
    """Write down the next rung of the ladder, and say it in one line."""
    plan = shortage.plan
    before = Fallback.load(folder.fallback)
    events = before.events if before else ()

    def peak(memory_options: MemoryOptions) -> int:
        if not _allows(planner.job, memory_options):
            return sys.maxsize
        return planner.accountant.account(replace(plan, memory_options=memory_options)).peak_bytes

    predicted = peak(plan.memory_options)
    figures = f"predicted {format_bytes(predicted)}" + (
        f", taken {format_bytes(taken_bytes)}" if taken_bytes is not None else ""
    )
    rung = None
    if len(events) < MAX_FALLBACKS:
        rung = planner.ladder.next_rung(plan.memory_options, peak)
    if rung is None:
        fell = f" after {len(events)} fall-backs" if events else ""
        raise MemoryShortageError(
            shortage.where,
            plan,
            shortage.step,
            f"{shortage.reason} ({figures}); no memory option is left{fell} that needs less: lower "
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
        "from": asdict(plan.memory_options),
        "to": asdict(rung),
    }
    content = {"memory_options": asdict(rung), "events": [*events, event]}
    with atomic_path(folder.fallback) as temporary:  # not `write_json`: any rank may run out
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return f"{shortage} ({figures}); from here on {_pulled(plan, rung, planner)}"


def _allows(job: Job, memory_options: MemoryOptions) -> bool:
    try:
        job.check(memory_options)
    except ConfigError:
        return False
    return True


def _pulled(before: FoldPlan, after: MemoryOptions, planner: BudgetPlanner) -> str:
    """Say which memory options change, and what those cost that are pulled now."""
    now, then = (
        planner.option_costs(replace(before, memory_options=after)),
        asdict(before.memory_options),
    )
    changes = []
    for option, value in asdict(after).items():
        if value == then[option] or option == "micro_batch_size":
            continue
        if option == "accumulate_grad_batches":
            words = f"micro-batches of {_split(after)} instead of {_split(before.memory_options)}"
        else:
            words = option.replace("_", " ") + ("" if value else " no more")
        changes.append(words + (f" (price: {now[option]})" if value and option in now else ""))
    return ", ".join(changes)


def _split(memory_options: MemoryOptions) -> str:
    return f"{memory_options.micro_batch_size} x {memory_options.accumulate_grad_batches}"
