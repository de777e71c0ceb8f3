"""When a signal ends a run, save a checkpoint after the current step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.signals import (
    Interrupted,
    defer_signals,
    pending_signal,
    stop_deferring_signals,
)


class SaveOnSignal(Callback):
    """Save a checkpoint after the step in which a signal was received, and end the run.

    All ranks end after the same step, whichever received the signal. During an evaluation the
    signal waits for the end of the evaluation and of the next step. A second signal ends the run at
    once.

    Args:
        path: The path of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        defer_signals()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:  # more micro-batches follow
            return
        self._last_step = trainer.global_step
        number = pending_signal()
        if trainer.strategy.reduce_boolean_decision(number is not None, all=False):
            trainer.save_checkpoint(self._path)
            raise Interrupted(number or SIGTERM, f"saved step {trainer.global_step}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_deferring_signals()


@contextmanager
def stop_workers_on_signal(trainer: Trainer) -> Iterator[None]:
    """On a signal, also end the ranks that this process started; later signals end at once."""
    try:
        yield
    except Interrupted as interrupted:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(interrupted.number)
        raise
    finally:
        stop_deferring_signals()
