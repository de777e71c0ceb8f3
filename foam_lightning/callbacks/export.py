"""Write the Hugging Face folder when training ends."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.data.module import TextData
from foam_lightning.model import save
from foam_lightning.module import LlamaFoam


class Export(Callback):
    """Write model and tokenizer as a Hugging Face folder after the last step.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if (
            trainer.is_global_zero
            and isinstance(pl_module, LlamaFoam)
            and pl_module.model is not None
            and isinstance(data, TextData)
        ):
            save(pl_module.model, data.tokenizer, self._folder)
