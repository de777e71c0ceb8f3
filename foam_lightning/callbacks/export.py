"""Write the Hugging Face folder when training ends."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.data.chat import end_of_turn_id
from foam_lightning.data.module import TextData
from foam_lightning.data.own import OwnData
from foam_lightning.model.llama import save_model
from foam_lightning.module import LlamaFoam


class Export(Callback):
    """Write model and tokenizer as a Hugging Face folder after the last step.

    Args:
        folder: The folder to write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, LlamaFoam) or not isinstance(data, TextData | OwnData):
            return
        if pl_module.model is None:
            return
        weights = None
        if pl_module.device_mesh is not None:  # a gather in which every rank takes part
            gathered = trainer.strategy.lightning_module_state_dict()
            weights = {name.removeprefix("model."): whole for name, whole in gathered.items()}
        tokenizer, is_chat = data.tokenizer, data.settings.chat
        turn = end_of_turn_id(tokenizer) if is_chat and tokenizer is not None else None
        save_model(pl_module.model, tokenizer, self._folder, weights, end_of_turn=turn)
