"""Where the full run is: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    CustomTimeColumn,
)
from rich.console import Console
from rich.progress import ProgressColumn, TextColumn
from typing_extensions import override

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.throughput import Throughput
from foam_lightning.units import format_bytes

_SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 20  # leaves room for the figures in 100 columns


def progress(throughput: Throughput, memory: MemoryMonitor) -> "StepBar | StepLines":
    """Choose how to show where the run is: a bar, or lines where the output is no terminal.

    Args:
        throughput: Knows tokens per second; comes before this among the callbacks.
        memory: Knows the peak and the budget; the same.
    """
    if Console().is_terminal:
        return StepBar(throughput, memory)
    return StepLines(throughput, memory)


class StepBar(RichProgressBar):
    """Show optimizer steps, which a run is measured in, where Lightning shows batches and epochs.

    Args:
        throughput: Knows tokens per second.
        memory: Knows the peak and the budget.
    """

    def __init__(self, throughput: Throughput, memory: MemoryMonitor) -> None:
        super().__init__()
        self._throughput = throughput
        self._memory = memory

    @property
    @override
    def total_train_batches(self) -> int:
        return int(self.trainer.max_steps)

    @override
    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(bar_width=_BAR_WIDTH),
            BatchesProcessedColumn(style=self.theme.batch_progress),
            CustomTimeColumn(style=self.theme.time),
        ]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_progress_bar_id is None:  # an epoch is nothing to a run of so many steps
            super().on_train_epoch_start(trainer, pl_module)
            self._update(self.train_progress_bar_id, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return {**figures(trainer.callback_metrics, self._throughput, self._memory)}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class StepLines(Callback):
    """Say where the run is in a line, every half minute, after evaluations and at the end.

    Args:
        throughput: Knows tokens per second.
        memory: Knows the peak and the budget.
    """

    def __init__(self, throughput: Throughput, memory: MemoryMonitor) -> None:
        self._throughput = throughput
        self._memory = memory
        self._said_at = 0.0
        self._said_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._said_at = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self._said_at >= _SECONDS_BETWEEN_LINES:
            self._say(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._said_step != trainer.global_step:
            self._say(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._say(trainer, pl_module)

    def _say(self, trainer: Trainer, module: LightningModule) -> None:
        self._said_at, self._said_step = time.perf_counter(), trainer.global_step
        steps_left = trainer.max_steps - trainer.global_step
        words = [f"step {trainer.global_step}/{trainer.max_steps}"]
        found = figures(trainer.callback_metrics, self._throughput, self._memory)
        words += [f"{name} {figure}" for name, figure in found.items()]
        if steps_left and self._throughput.step_seconds is not None:
            seconds = round(steps_left * self._throughput.step_seconds)
            words.append(f"{timedelta(seconds=seconds)} left")
        module.print("  ".join(words))


def figures(
    logged: Mapping[str, Any], throughput: Throughput, memory: MemoryMonitor
) -> dict[str, str]:
    """Put what matters while a run trains into words, by name; what is not known yet is left out.

    Args:
        logged: What Lightning keeps of what was logged.
        throughput: Knows tokens per second.
        memory: Knows the peak and the budget.
    """
    found = {
        name: f"{float(logged[tag]):.3f}"
        for name, tag in (("loss", "train/loss"), ("validation", "validation/loss"))
        if tag in logged
    }
    skipped = int(logged.get("train/skipped_steps", 0))
    if skipped:
        found["skipped"] = str(skipped)
    if throughput.tokens_per_second is not None:
        found["tokens/s"] = f"{throughput.tokens_per_second:.0f}"
    if memory.measured_bytes is not None:
        found["memory"] = _against(memory.measured_bytes, memory.budget_bytes)
    return found


def _against(num_bytes: int, budget_bytes: int | None) -> str:
    """Write bytes beside a budget: "5.9/8.0 GB"."""
    if budget_bytes is None:
        return format_bytes(num_bytes)
    number, unit = format_bytes(num_bytes).split()
    limit, limit_unit = format_bytes(budget_bytes).split()
    taken = f"{float(number):.1f}" + (f" {unit}" if unit != limit_unit else "")
    return f"{taken}/{float(limit):.1f} {limit_unit}"
