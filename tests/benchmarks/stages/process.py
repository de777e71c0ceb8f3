"""Run a stage in a process group of its own, which ends with the campaign or at its limit."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.fresh_process import in_fresh_process
from tests.benchmarks.stages.record import LOG, Setting

_FIRST_SECONDS = 100  # to import everything and to start CUDA
_TOLD_LINES, _TOLD_CHARACTERS = 15, 2000
_MOST_LOG_BYTES = 400_000  # of a stage
_STACK_SECONDS = 2.0  # before the limit, a stage writes where it is


class Ending(NamedTuple):
    """How a stage ended: "done", "failed" or "timed out", and the last lines that it wrote."""

    result: str
    seconds: float
    error: str | None = None


def new_context(device: str) -> tuple[Any, str | None]:
    """Make the context of all stages: processes forked from one that has imported everything.

    That process must not have used the GPU; asking by NVML whether there is one leaves it so. Where
    a forked process still cannot use the GPU, every process imports for itself.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The context, and why none of its processes can use the device; None if they can.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.stages.preload"])
    if device == "cpu":
        return context, None
    _, failure = in_fresh_process(context, _FIRST_SECONDS, _use_gpu)
    if failure is not None:
        context = multiprocessing.get_context("spawn")
        _, failure = in_fresh_process(context, _FIRST_SECONDS, _use_gpu)
    return context, failure


def _use_gpu() -> None:
    import torch

    torch.zeros(1, device="cuda")


def run_stage(context: Any, function: str, setting: Setting) -> Ending:
    """Call `module:function` with the setting, in a process group of its own."""
    log = setting.record.folder / LOG
    begin, start = time.monotonic(), log.stat().st_size if log.exists() else 0
    process = context.Process(target=_run, args=(function, setting))
    process.start()
    try:
        process.join(max(0.0, setting.seconds_left()))
        is_late = process.exitcode is None
    finally:
        with suppress(ProcessLookupError):  # nothing is left, or it does not lead its group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    seconds = time.monotonic() - begin
    told = _shorten(log, start)
    if is_late:
        return Ending("timed out", seconds, f"not done after {seconds:.0f} s\n{told}")
    if process.exitcode == 0:
        return Ending("done", seconds)
    return Ending("failed", seconds, f"exit code {process.exitcode}\n{told}")


def _run(function: str, setting: Setting) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(setting.record.folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(0.1, setting.seconds_left() - _STACK_SECONDS))
    print(f"---- {setting.record.stage}", flush=True)
    module, name = function.split(":")
    getattr(import_module(module), name)(setting)


def _end_with_parent() -> None:
    """Kill the group as soon as the campaign is gone, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _shorten(log: Path, start: int) -> str:
    """Keep the end of what a stage wrote to the log, and return its last lines."""
    with log.open("r+b") if log.exists() else log.open("w+b") as file:
        file.seek(start)
        written = file.read()
        if len(written) > _MOST_LOG_BYTES:
            written = b"...\n" + written[-_MOST_LOG_BYTES:]
            file.seek(start)
            file.truncate()
            file.write(written)
    lines = [line for line in written.decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_TOLD_LINES:])[-_TOLD_CHARACTERS:]
