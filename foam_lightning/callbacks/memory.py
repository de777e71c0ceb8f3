"""Measure the memory that the account predicted."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.memory.tracker import StorageTracker

# Steady from the second on: the first one creates the optimizer state.
_TRACKED_STEPS = 2


class MemoryWatch(Callback):
    """Measure the peak of a run and show it beside the prediction.

    On a GPU the peak is torch's own count of allocated bytes, over the whole run. On a CPU, where
    nothing counts, every storage of the first two optimizer steps is tracked.

    Args:
        predicted_bytes: The account's peak; None where there was no account.
    """

    def __init__(self, predicted_bytes: int | None = None) -> None:
        self.predicted_bytes = predicted_bytes
        self.measured_bytes: int | None = None
        self._tracker: StorageTracker | None = None
        self._last_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        self._last_step = trainer.global_step + _TRACKED_STEPS
        self._tracker = StorageTracker()
        self._tracker.claim(pl_module.parameters(), "weights")
        for state in trainer.optimizers[0].state.values():
            self._tracker.claim(
                (value for value in state.values() if isinstance(value, torch.Tensor)),
                "optimizer_state",
            )
        self._tracker.__enter__()  # type: ignore[no-untyped-call]

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if pl_module.device.type == "cuda":
            self.measured_bytes = torch.cuda.max_memory_allocated()
        elif self._tracker is not None and trainer.global_step >= self._last_step:
            self._stop()
        if self.measured_bytes is not None:
            pl_module.log("memory/measured_bytes", float(self.measured_bytes))
        if self.predicted_bytes is not None:
            pl_module.log("memory/predicted_bytes", float(self.predicted_bytes))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.measured_bytes = self._tracker.peak().total_bytes
            self._tracker = None
