"""Count tokens per second."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class Throughput(Callback):
    """Log the tokens that training takes in per second, evaluation left out.

    The clock runs from the end of one batch to the end of the next, so that waiting for data
    counts, and on a GPU the work that outlives the call that started it.

    Attributes:
        tokens_per_second: Over the whole run so far; None before the first step.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._since = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self.tokens_per_second = self._tokens / self._seconds
        pl_module.log("train/tokens_per_second", self.tokens_per_second, prog_bar=True)
