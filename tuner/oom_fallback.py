"""The memory cap at the budget, and the next memory options when memory runs out."""

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
from foam_lightning.units import format_bytes_apart
from tuner.console import say
from tuner.planning.planner import BudgetPlanner

# Every fall-back restarts the process; a run that needs more of them has another problem.
MAX_FALLBACKS = 8
_FIRST_OWN_FILE = 3  # after stdin, stdout and stderr


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """The memory options that a run uses since memory ran out; `fallback.json` in its folder.

    Attributes:
        memory_options: They replace those of the plan.
        events: One for each time that memory ran out, oldest first: when, where, step, reason,
            predicted and used bytes, and the memory options before and after.
    """

    memory_options: MemoryOptions
    events: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read the file; None if there is none.

        Raises:
            PlanError: The file is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            # Runs of the first release say "levers".
            key = "levers" if "levers" in content else "memory_options"
            return cls(
                memory_options=MemoryOptions(**content[key]), events=tuple(content["events"])
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, PlanError) as error:
            raise PlanError(
                f"cannot read {path} ({type(error).__name__}); delete it to resume with the memory "
                "options of the plan"
            ) from error

    def __str__(self) -> str:
        enabled = [
            name.replace("_", " ") for name, on in asdict(self.memory_options).items() if on is True
        ]
        times = "once" if len(self.events) == 1 else f"{len(self.events)} times"
        options = ", ".join([_describe_batch(self.memory_options), *enabled])
        return f"memory ran out {times} before; resuming with {options}"


@contextmanager
def fall_back_when_out_of_memory(planner: BudgetPlanner, folder: RunFolder) -> Iterator[None]:
    """Cap GPU memory at the budget, and write down the next memory options if it runs out.

    Args:
        planner: The plans of the job; its budget is the cap.
        folder: Gets `fallback.json`.

    Raises:
        MemoryFallbackError: Memory ran out; the same command resumes with options that need less.
        MemoryShortageError: Memory ran out, and no options need less.
    """
    gpu, budget = planner.job.gpu, planner.budget_bytes
    try:
        with nullcontext() if gpu is None or budget is None else _capped(planner, gpu, budget):
            yield
    except MemoryShortageError as shortage:
        used = gpu.usage().reserved + planner.accountant.context if gpu is not None else None
        raise MemoryFallbackError(_fall_back(shortage, planner, folder, used)) from shortage


@contextmanager
def _capped(planner: BudgetPlanner, gpu: Gpu, budget: int) -> Iterator[None]:
    outside = planner.accountant.context
    if warning := missing_memory_warning(gpu, budget, outside):
        say(warning)
    with memory_cap(gpu, budget, outside):
        yield


def restart_process() -> None:
    """Replace this process by a fresh one of the same command, whose memory state is clean.

    Returns only in one of several training processes, which cannot start on its own.
    """
    if "LOCAL_RANK" in os.environ:
        return
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    # The driver holds this process's GPU memory for as long as its files are open.
    for number in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        if number >= _FIRST_OWN_FILE:
            with suppress(OSError):  # closed since, as the listing itself is
                os.set_inheritable(number, False)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fall_back(
    shortage: MemoryShortageError,
    planner: BudgetPlanner,
    folder: RunFolder,
    used_bytes: int | None,
) -> str:
    """Write down the next memory options, and describe the change in one line."""
    plan = shortage.plan
    before = Fallback.load(folder.fallback)
    events = before.events if before else ()

    def peak(memory_options: MemoryOptions) -> int | None:
        if not _is_allowed(planner.job, memory_options):
            return None
        return planner.accountant.account(replace(plan, memory_options=memory_options)).peak_bytes

    predicted = planner.accountant.account(plan).peak_bytes
    counts = {"predicted": predicted, "used": used_bytes, "budget": planner.budget_bytes}
    known = {name: count for name, count in counts.items() if count is not None}
    texts = format_bytes_apart(*known.values())
    figures = ", ".join(f"{name} {text}" for name, text in zip(known, texts, strict=True))
    options = None
    if len(events) < MAX_FALLBACKS:
        options = planner.ladder.find_smaller(plan.memory_options, peak)
    if options is None:
        tried = f" after {len(events)} fall-backs" if events else ""
        raise MemoryShortageError(
            shortage.where,
            plan,
            shortage.step,
            f"{shortage.reason} ({figures}); no memory options are left{tried} that need less: "
            "lower data.batch_size or data.sequence_length, choose a smaller model, or raise "
            "--memory-budget",
        )
    event = {
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "where": shortage.where,
        "step": shortage.step,
        "reason": shortage.reason,
        "predicted_peak_bytes": predicted,
        "taken_bytes": used_bytes,
        "from": asdict(plan.memory_options),
        "to": asdict(options),
    }
    content = {"memory_options": asdict(options), "events": [*events, event]}
    with atomic_path(folder.fallback) as temporary:  # not `write_json`: any rank may run out
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return f"{shortage} ({figures}); continuing with {_describe_change(plan, options, planner)}"


def _is_allowed(job: Job, memory_options: MemoryOptions) -> bool:
    try:
        job.check_memory_options(memory_options)
    except ConfigError:
        return False
    return True


def _describe_change(before: FoldPlan, after: MemoryOptions, planner: BudgetPlanner) -> str:
    """List the memory options that change, and what new ones cost in speed."""
    costs = planner.option_costs(replace(before, memory_options=after))
    values_before = asdict(before.memory_options)
    changes = []
    for option, value in asdict(after).items():
        if value == values_before[option] or option == "micro_batch_size":
            continue
        if option == "accumulate_grad_batches":
            change = f"{_describe_batch(after)} instead of {_describe_batch(before.memory_options)}"
        else:
            change = option.replace("_", " ") + ("" if value else " off")
        changes.append(change + (f" ({costs[option]})" if value and option in costs else ""))
    return ", ".join(changes)


def _describe_batch(memory_options: MemoryOptions) -> str:
    size, count = memory_options.micro_batch_size, memory_options.accumulate_grad_batches
    return f"{count} micro-batches of {size}" if count > 1 else f"a batch of {size}"
