"""Runs of a few seconds that several tests share, and their results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback

from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.job import Job
from foam_lightning.model.loss import token_loss
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.storage.run_identity import RunIdentity
from foam_lightning.training import TrainingResult

NewJob = Callable[..., Job]
STEPS = 17  # no multiple of the steps between two checkpoints
# The settings of a trainer that writes nothing.
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}


class Finished(NamedTuple):
    """A finished full run."""

    job: Job
    plan: FoldPlan
    folder: RunFolder
    trained: TrainingResult


def small(new_job: NewJob, **trainer: Any) -> Job:
    return new_job(
        data={"micro_batch_size": 4},
        trainer={"max_steps": STEPS, "val_check_interval": 4, **trainer},
    )


def open_folder(root: Path) -> RunFolder:
    return RunFolder.open(root, "run", RunIdentity())


def validation_loss(model: Any, head: Any, job: Job) -> float:
    data = job.new_data(job.memory_options)
    data.setup()
    nats = count = 0.0
    for batch in data.val_dataloader():
        with torch.no_grad():
            hidden = model(input_ids=batch["input_ids"]).last_hidden_state
            total, num_tokens = token_loss(hidden, head, batch["labels"])
        nats, count = nats + float(total), count + int(num_tokens)
    return nats / count


class StopError(Exception):
    pass


class StopAfter(Callback):
    """Raise in the middle of a run, like a process that is killed."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self._step:
            raise StopError


def final_weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = read_checkpoint(folder.last_checkpoint)["state_dict"]
    return weights
