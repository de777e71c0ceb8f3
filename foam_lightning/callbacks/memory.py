"""Measure the peak of memory, and compare it with the prediction."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.memory.device import Gpu, GpuUsage, current_context, load_costs
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.units import format_bytes

# The first step creates the optimizer state; the second has the peak of all that follow.
_TRACKED_STEPS = 2
# Predictions are within 1 %; a measured peak this far above one is reported.
_TOLERANCE = 0.02


class MemoryMonitor(Callback):
    """Log the measured peak of memory with the predicted one, and warn once if it is above that.

    On a GPU the peak is what the caching allocator reserved over the whole run, plus the CUDA
    context, which grows as kernels are loaded and is read again after every evaluation. A CPU has
    no such counters, so every storage of the first two optimizer steps is tracked.

    Args:
        predicted_bytes: The predicted peak; None if there is none.
        budget_bytes: The memory budget, logged with both; None if there is none.
        through_evaluation: On a CPU, track until the end of the first evaluation.
        gpu: The GPU; by default the module's device, if that is one.

    Attributes:
        measured_bytes: The peak; None until it is known.
        usage: The counters of the GPU; None on a CPU.
        context_bytes: The CUDA context; None on a CPU.
    """

    def __init__(
        self,
        predicted_bytes: int | None = None,
        *,
        budget_bytes: int | None = None,
        through_evaluation: bool = False,
        gpu: Gpu | None = None,
    ) -> None:
        self.predicted_bytes = predicted_bytes
        self.budget_bytes = budget_bytes
        self.measured_bytes: int | None = None
        self.usage: GpuUsage | None = None
        self._through_evaluation = through_evaluation
        self._gpu = gpu
        self.context_bytes: int | None = None
        self._retries_before = 0
        self._tracker: StorageTracker | None = None
        self._last_step = 0
        self._has_warned = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda" and self._gpu is None:
            self._gpu = Gpu(pl_module.device.index or 0)
        if self._gpu is not None:
            self.context_bytes = load_costs(self._gpu).context
            self._gpu.reset_peaks()
            self._retries_before = self._gpu.usage().retries
            return
        self._last_step = trainer.global_step + _TRACKED_STEPS
        self._tracker = StorageTracker()
        self._tracker.claim(pl_module.parameters(), "weights")
        for state in trainer.optimizers[0].state.values():
            self._tracker.claim(
                (value for value in state.values() if isinstance(value, torch.Tensor)),
                "optimizer_state",
            )
        self._tracker.__enter__()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._through_evaluation and trainer.global_step >= self._last_step:
            self._stop()
        self._read_counters()
        figures = {
            "measured_bytes": self.measured_bytes,
            "predicted_bytes": self.predicted_bytes,
            "budget_bytes": self.budget_bytes,
        }
        if self.usage is not None:
            allocated, reserved, retries = self.usage
            figures |= {"allocated_bytes": allocated, "reserved_bytes": reserved}
            figures["allocator_retries"] = retries
        for name, figure in figures.items():
            if figure is not None:
                pl_module.log(f"memory/{name}", float(figure))
        self._warn(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._through_evaluation:
            self._stop()
        if self._gpu is not None and not trainer.sanity_checking:
            self.context_bytes = current_context(self._gpu)
        self._read_counters()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _read_counters(self) -> None:
        if self._gpu is not None:
            usage = self._gpu.usage()
            self.usage = usage._replace(retries=usage.retries - self._retries_before)
            self.measured_bytes = usage.reserved + (self.context_bytes or 0)

    def _warn(self, module: LightningModule) -> None:
        """Warn once, in one line, of allocator retries or of a peak above the prediction."""
        measured, predicted = self.measured_bytes, self.predicted_bytes
        retries = self.usage.retries if self.usage is not None else 0
        is_above = bool(measured and predicted and measured > predicted * (1 + _TOLERANCE))
        if self._has_warned or not (retries or is_above):
            return
        self._has_warned = True
        text = f"memory: {format_bytes(measured or 0)} measured"
        if predicted:
            text += f", {format_bytes(predicted)} predicted"
        if retries:
            text += f"; the allocator had to empty its cache {retries} times, which is slow"
        module.print(f"{text}; lower data.micro_batch_size or raise --memory-budget")

    def _stop(self) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self.measured_bytes = self._tracker.peak().total_bytes
            self._tracker = None
