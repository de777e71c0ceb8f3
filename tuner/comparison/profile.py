"""Measure the memory and speed of optimizers: bytes of state, peak memory, time per step."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.optim.plain_state import measure_state_bytes, state_tensors
from foam_lightning.plan import FoldPlan
from tuner.trials.runner import StepClock, TrialRunner


def processor() -> str:
    """Read the name of the processor from the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> str:
    """Describe the processor, and how many threads torch uses."""
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def packages(*names: str) -> str:
    """List the versions of Python and of installed packages."""
    found = [f"python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


_ROUNDS, _STEPS, _WARM_STEPS = 3, 7, 2


@dataclass(frozen=True)
class OptimizerProfile:
    """The memory and speed of an optimizer.

    Attributes:
        state_bytes: Tensors kept between steps.
        peak_bytes: Peak of a training step: on a GPU the allocated memory, on a CPU all tensors,
            without buffers inside kernels and with torch.compile off, so nothing is fused.
        step_seconds: Median time of a training step, forward and backward included.
    """

    state_bytes: int
    peak_bytes: int
    step_seconds: float


def profile_optimizers(
    runners: Mapping[str, tuple[TrialRunner, FoldPlan]],
    on_steps: Callable[[int], None] = lambda _: None,
) -> dict[str, OptimizerProfile]:
    """Measure optimizers in turns, a few steps of each, three times.

    Taking turns spreads the load of other processes evenly. The first steps, which compile and
    decompose, are not timed.

    Args:
        runners: By optimizer, what trains it and with which plan.
        on_steps: Called with the number of optimizer steps taken.
    """
    profilers = {name: _MemoryProfiler() for name in runners}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for name, (runner, plan) in runners.items():
        runner.train(plan, num_steps=2, callbacks=[profilers[name]])
        on_steps(2)
    for _ in range(_ROUNDS):
        for name, (runner, plan) in runners.items():
            clock = StepClock()
            runner.train(plan, num_steps=_STEPS, callbacks=[clock])
            steps = [after - before for before, after in pairwise(clock.times)]
            seconds[name] += steps[_WARM_STEPS - 1 :]
            on_steps(_STEPS)
    return {
        name: OptimizerProfile(
            profiler.state_bytes, profiler.peak_bytes, statistics.median(seconds[name])
        )
        for name, profiler in profilers.items()
    }


def num_profile_steps(num_optimizers: int) -> int:
    """Count the optimizer steps that `profile_optimizers` takes."""
    return num_optimizers * (2 + _ROUNDS * _STEPS)


class _MemoryProfiler(Callback):
    """Track the memory of a short training run, from its first step to its last."""

    def __init__(self) -> None:
        self.state_bytes = self.peak_bytes = 0
        self._tracker = StorageTracker()
        self._contexts = ExitStack()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            return
        # adamw8bit needs torch.compile, which refuses to compile under the tracker.
        self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
        self._tracker.claim(pl_module.parameters(), "weights")
        self._tracker.claim(state_tensors(trainer.optimizers[0]), "optimizer_state")
        self._contexts.enter_context(self._tracker)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._contexts.close()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state_bytes = measure_state_bytes(trainer.optimizers[0])
        if pl_module.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(pl_module.device)
            return
        self._contexts.close()
        self.peak_bytes = self._tracker.peak().total_bytes
