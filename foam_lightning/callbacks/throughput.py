"""Count tokens per second."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class Throughput(Callback):
    """Log the tokens that training takes in per second, evaluation left out.

    Attributes:
        tokens_per_second: Over the whole run so far; None before the first step.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._since = 0.0

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
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
        self._seconds += time.perf_counter() - self._since
        self.tokens_per_second = self._tokens / self._seconds
        self.log("train/tokens_per_second", self.tokens_per_second, prog_bar=True)
