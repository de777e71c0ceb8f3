"""The progress bar of the full run."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override


class StepBar(RichProgressBar):
    """Show optimizer steps, which a run is measured in, where Lightning shows epochs."""

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
