"""A run that ends before its last step: after a time, or because a callback stops it."""

from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from typing_extensions import override


class RunEnd(Callback):
    """Let a run that is asked to stop finish its optimizer step, and say what stopped it.

    Lightning stops after any micro-batch, and the gradients of an incomplete step are lost. It also
    adds the time that earlier commands took to that of `trainer.max_time`, so that a run which the
    time has ended once would never go on; here each command has the time for itself.
    """

    def __init__(self) -> None:
        self._last_step = 0
        self._is_complete = True
        self._is_asked = False

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for timer in _timers(trainer):
            checkpoint["callbacks"].pop(timer.state_key, None)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._is_complete = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        self._finish_step(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_step(trainer)

    def _finish_step(self, trainer: Trainer) -> None:
        self._is_asked = self._is_asked or trainer.should_stop
        trainer.should_stop = self._is_asked and self._is_complete


def time_left(trainer: Trainer) -> float | None:
    """Return the seconds until `trainer.max_time` ends the run; None if nothing limits its time."""
    times = [timer.time_remaining() for timer in _timers(trainer)]
    return min((seconds for seconds in times if seconds is not None), default=None)


def describe_end(trainer: Trainer) -> str:
    """Name what ended a run before its last step."""
    if has_run_out_of_time(trainer):
        limits = [timer._duration for timer in _timers(trainer) if timer._duration is not None]
        return f"trainer.max_time {timedelta(seconds=min(limits))}"
    names = [type(one).__name__ for one in _callbacks(trainer) if isinstance(one, EarlyStopping)]
    return " and ".join(names) or "a callback"


def has_run_out_of_time(trainer: Trainer) -> bool:
    """Whether `trainer.max_time` has ended a run."""
    seconds = time_left(trainer)
    return seconds is not None and seconds <= 0


def _timers(trainer: Trainer) -> list[Timer]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, Timer)]


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
