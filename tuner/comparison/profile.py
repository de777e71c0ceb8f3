"""What an optimizer takes: bytes of state, peak memory, time of a step."""

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
    """Name the processor as the system does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> str:
    """Name the processor, and how much of it torch uses."""
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def packages(*names: str) -> str:
    """Name the versions of Python and of installed packages."""
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
    """What an optimizer takes beside the loss it gives.

    Attributes:
        state_bytes: Of the tensors that it keeps between steps.
        peak_bytes: Of a training step: on a CPU of all tensors, on a GPU what is allocated. On a
            CPU what a kernel takes inside itself is not seen, and what torch.compile would fuse
            is counted operator by operator.
        step_seconds: Median time of a training step, forward and backward pass included.
    """

    state_bytes: int
    peak_bytes: int
    step_seconds: float


def measure(
    benches: Mapping[str, tuple[TrialRunner, FoldPlan]],
    on_steps: Callable[[int], None] = lambda _: None,
) -> dict[str, OptimizerProfile]:
    """Measure optimizers side by side: some steps of each in turn, three times over.

    Whatever else the machine does falls on all of them. The first steps, which compile and
    decompose, are not timed.

    Args:
        benches: Where each trains, and by which plan, by name.
        on_steps: Called with the number of steps that were taken.
    """
    watches = {name: _Watch() for name in benches}
    seconds: dict[str, list[float]] = {name: [] for name in benches}
    for name, (bench, plan) in benches.items():
        bench.train(plan, num_steps=2, callbacks=[watches[name]])
        on_steps(2)
    for _ in range(_ROUNDS):
        for name, (bench, plan) in benches.items():
            clock = StepClock()
            bench.train(plan, num_steps=_STEPS, callbacks=[clock])
            steps = [after - before for before, after in pairwise(clock.times)]
            seconds[name] += steps[_WARM_STEPS - 1 :]
            on_steps(_STEPS)
    return {
        name: OptimizerProfile(
            watch.state_bytes, watch.peak_bytes, statistics.median(seconds[name])
        )
        for name, watch in watches.items()
    }


def num_steps(num_optimizers: int) -> int:
    """Count the optimizer steps that `measure` takes."""
    return num_optimizers * (2 + _ROUNDS * _STEPS)


class _Watch(Callback):
    """Watch the memory of a short training, from its first step to its last."""

    def __init__(self) -> None:
        self.state_bytes = self.peak_bytes = 0
        self._tracker = StorageTracker()
        self._watching = ExitStack()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            return
        # Under the tracker torch.compile refuses to compile: adamw8bit would end there.
        self._watching.enter_context(torch.compiler.set_stance("force_eager"))
        self._tracker.claim(pl_module.parameters(), "weights")
        self._tracker.claim(state_tensors(trainer.optimizers[0]), "optimizer_state")
        self._watching.enter_context(self._tracker)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._watching.close()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state_bytes = measure_state_bytes(trainer.optimizers[0])
        if pl_module.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(pl_module.device)
            return
        self._watching.close()
        self.peak_bytes = self._tracker.peak().total_bytes
