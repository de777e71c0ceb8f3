"""The callbacks that the settings name: what can be known of them before training."""

from collections.abc import Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor

from foam_lightning.errors import ConfigError, first_line

# What a callback may monitor: what the module and our own callbacks log in every run.
LOGGED = (
    "validation/loss",
    "validation/perplexity",
    "train/loss",
    "train/learning_rate",
    "train/skipped_steps",
    "throughput/tokens_per_second",
    "throughput/step_seconds",
    "throughput/model_flops_per_second",
)


def check_callbacks(
    callbacks: Sequence[Callback], trainer: Trainer, module: LightningModule
) -> None:
    """Check that callbacks can work, so that a long search does not end with one that cannot.

    Those of Lightning are set up, on a copy. One of somebody's own is not: its setup may write.

    Args:
        callbacks: Those of the settings.
        trainer: Created with their arguments.
        module: What would be trained.

    Raises:
        ConfigError: One monitors what nothing logs, or lacks something, such as a package.
    """
    ours = [one for one in callbacks if type(one).__module__.startswith("lightning.")]
    for callback in callbacks:
        name = type(callback).__name__
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and len(ours) == len(callbacks):
            _check_monitor(name, monitor, callbacks)
        if callback not in ours or isinstance(callback, Checkpoint):
            continue
        try:
            deepcopy(callback).setup(trainer, module, "fit")
        except Exception as error:
            reason = first_line(error)
            raise ConfigError(f"trainer.callbacks: {name} cannot work: {reason}") from error


def _check_monitor(name: str, monitor: Any, callbacks: Sequence[Callback]) -> None:
    has_rates = any(isinstance(one, LearningRateMonitor) for one in callbacks)
    if monitor in LOGGED or (has_rates and str(monitor).startswith("lr-")):
        return
    similar = get_close_matches(str(monitor), LOGGED, n=1, cutoff=0.5)
    raise ConfigError(
        f"trainer.callbacks: {name} monitors {monitor!r}, which nothing logs"
        + (f"; did you mean {similar[0]}?" if similar else "")
        + f"; logged are {', '.join(LOGGED)}"
    )
