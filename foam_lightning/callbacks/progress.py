"""The progress of the full run: a bar on a terminal, elsewhere a line now and then."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
)
from rich import get_console
from rich.console import Console
from rich.progress import ProgressColumn, TextColumn, TimeRemainingColumn
from typing_extensions import override

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.run_end import time_left
from foam_lightning.callbacks.throughput import Throughput
from foam_lightning.units import format_bytes

_SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTHS = range(5, 21)


def progress(throughput: Throughput, memory: MemoryMonitor) -> "StepBar | StepLines":
    """Choose a bar, or lines where the output is no terminal that can move its cursor.

    Args:
        throughput: The source of tokens per second; must be an earlier callback.
        memory: The source of peak and budget; must be an earlier callback.
    """
    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return StepBar(throughput, memory)
    return StepLines(throughput, memory)


class StepBar(RichProgressBar):
    """Count optimizer steps, where Lightning's own bar counts batches and epochs."""

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
        bar = [CustomBarColumn(bar_width=self._bar_width)] if self._bar_width else []
        steps = BatchesProcessedColumn(style=self.theme.batch_progress)
        return [TextColumn("{task.description}"), *bar, steps, TimeRemainingColumn()]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_progress_bar_id is None:  # one bar for the whole run, not one an epoch
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
        """Return the figures, without the last ones where the line has no room for them."""
        found = figures(trainer.callback_metrics, self._throughput, self._memory)
        others = f"Validation {trainer.max_steps}/{trainer.max_steps} 0:00:00 "
        room = get_console().width - len(others) - self._bar_width - 1
        while sum(len(f"{name}: {figure} ") for name, figure in found.items()) > room:
            found.popitem()
        return {**found}

    @property
    def _bar_width(self) -> int:
        """Columns of the bar, less on narrow terminals; 0 where only text has room."""
        width = (get_console().width - 60) // 3
        return min(width, _BAR_WIDTHS[-1]) if width >= _BAR_WIDTHS[0] else 0

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class StepLines(Callback):
    """Print a line every half minute, after evaluations and at the end."""

    def __init__(self, throughput: Throughput, memory: MemoryMonitor) -> None:
        self._throughput = throughput
        self._memory = memory
        self._printed_at = 0.0
        self._printed_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed_at = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._printed_step != trainer.global_step:
            self._print(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print(trainer, pl_module)

    def _print(self, trainer: Trainer, module: LightningModule) -> None:
        self._printed_at, self._printed_step = time.perf_counter(), trainer.global_step
        steps_left = trainer.max_steps - trainer.global_step
        found = figures(trainer.callback_metrics, self._throughput, self._memory)
        parts = [f"step {trainer.global_step}/{trainer.max_steps}"]
        parts += [f"{name} {figure}" for name, figure in found.items()]
        if steps_left > 0 and self._throughput.step_seconds is not None:
            seconds = round(steps_left * self._throughput.step_seconds)
            if (limit := time_left(trainer)) is not None:
                seconds = min(seconds, max(0, round(limit)))
            parts.append(f"{timedelta(seconds=seconds)} left")
        module.print("  ".join(parts))


def figures(
    logged: Mapping[str, Any], throughput: Throughput, memory: MemoryMonitor
) -> dict[str, str]:
    """Write the figures of a run as text by name, the most important first.

    Args:
        logged: Lightning's `callback_metrics`.
        throughput: The source of tokens per second.
        memory: The source of peak and budget.

    Returns:
        Loss, validation loss, skipped steps, memory and tokens per second, those that are known.
    """
    found = {
        name: f"{float(logged[tag]):.3f}"
        for name, tag in (("loss", "train/loss"), ("validation", "validation/loss"))
        if tag in logged
    }
    if skipped := int(logged.get("train/skipped_steps", 0)):
        found["skipped"] = str(skipped)
    if memory.measured_bytes is not None:
        found["memory"] = _format_share(memory.measured_bytes, memory.budget_bytes)
    if throughput.tokens_per_second is not None:
        found["tokens/s"] = f"{throughput.tokens_per_second:.0f}"
    return found


def _format_share(num_bytes: int, budget_bytes: int | None) -> str:
    """Write bytes and the budget that they are a part of: "5.9/8.0 GB"."""
    if budget_bytes is None:
        return format_bytes(num_bytes)
    number, unit = format_bytes(num_bytes).split()
    limit, limit_unit = format_bytes(budget_bytes).split()
    used = f"{float(number):.1f}" + (f" {unit}" if unit != limit_unit else "")
    return f"{used}/{float(limit):.1f} {limit_unit}"
