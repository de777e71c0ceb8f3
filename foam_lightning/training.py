"""The full run: train by a plan, watch it, keep checkpoints, export, sum up."""

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from foam_lightning.callbacks.exact_resume import ExactResume
from foam_lightning.callbacks.export import Export
from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.preemption import SaveOnSignal, stop_workers_on_signal
from foam_lightning.callbacks.progress import StepBar, progress
from foam_lightning.callbacks.residual_energy import ResidualEnergy
from foam_lightning.callbacks.spike_guard import LIMITS, SpikeGuard, StepPolicy
from foam_lightning.callbacks.tensorboard import TensorBoardLayout
from foam_lightning.callbacks.throughput import Throughput
from foam_lightning.checkpoint.io import previous_checkpoint
from foam_lightning.checkpoint.load import (
    IntactCheckpoint,
    check_plan,
    read_checkpoint,
    resume_point,
)
from foam_lightning.data.module import TextData
from foam_lightning.job import Job
from foam_lightning.memory.device import memory_shortage_context
from foam_lightning.model.llama import save_tokenizer
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import format_bytes


def hyperparameters(
    job: Job, module: LlamaFoam, plan: FoldPlan, budget_bytes: int | None
) -> dict[str, str | float]:
    """Name the settings that runs are compared by; every run has all of them.

    The tab takes names and types from one run for all, so each is a text or a number for good. It
    sorts by name and shows five: budget, lr, optimizer, plan and scale are the first.

    Args:
        job: What is trained.
        module: Has the sizes of the model.
        plan: The levels, the learning rate and the memory options.
        budget_bytes: The budget; None where there was none.

    Returns:
        The settings by name. `scale` is that of most matrices; a baseline of FOAM has neither plan
        nor scale of its own.
    """
    optimizer = job.optimizer
    scales = plan.scales.values() if optimizer == "foam" else ()
    (scale, _), *_ = Counter(scales).most_common(1) or [(1.0, 0)]
    return {
        "budget": "none" if budget_bytes is None else format_bytes(budget_bytes),
        "lr": plan.lr,
        "optimizer": optimizer,
        "plan": describe_plan(plan.levels if optimizer == "foam" else {}),
        "scale": scale,
        "seed": job.seed,
        "sequence_length": job.data.sequence_length,
        "sequences_per_step": job.batch_size,
        "state_dtype": plan.memory_options.state_dtype,
        "steps": job.max_steps,
        "weights": sum(math.prod(shape) for shape in module.shapes.values()),
        "weights_precision": job.precision,
    }


def final_metrics(
    validation_loss: float, peak_bytes: int | None, tokens_per_second: float | None
) -> dict[str, Any]:
    """Name the final figures by their tags; what is not known is left out.

    Args:
        validation_loss: In nats per token.
        peak_bytes: Measured.
        tokens_per_second: Over the whole run.
    """
    figures = {
        "final/validation_loss": validation_loss,
        "final/peak_bytes": peak_bytes,
        "final/tokens_per_second": tokens_per_second,
    }
    return {tag: float(figure) for tag, figure in figures.items() if figure is not None}


def describe_plan(levels: Mapping[str, int]) -> str:
    """Name the levels of a plan in two words: "level 2", or "mixed 0-4".

    Args:
        levels: By parameter name.
    """
    if not levels:
        return "unfolded"
    least, most = min(levels.values()), max(levels.values())
    return f"level {least}" if least == most else f"mixed {least}-{most}"


_PACKAGES = ("torch", "lightning", "transformers", "datasets", "optuna", "tensorboard")


@dataclass(frozen=True)
class Trained:
    """What the full run measured.

    Attributes:
        measured_peak_bytes: None where nothing was trained, as after the last step.
        final_validation_loss: In nats per token, unbiased.
        validation_tokens: How many tokens that is the mean of.
        tokens_per_second: None where nothing was trained.
        skipped_steps: Steps that were not taken, since their numbers were bad.
        rollbacks: How often the run went back to a checkpoint.
    """

    measured_peak_bytes: int | None
    final_validation_loss: float
    validation_tokens: int
    tokens_per_second: float | None
    skipped_steps: int = 0
    rollbacks: int = 0


def train(
    job: Job,
    plan: FoldPlan,
    folder: RunFolder,
    *,
    predicted_bytes: int | None = None,
    budget_bytes: int | None = None,
    pictures: Mapping[str, Path] | None = None,
    ckpt_path: Path | None = None,
) -> Trained:
    """Train by a plan, from the last checkpoint of the folder if there is one.

    Args:
        job: What to train.
        plan: The levels, the learning rate and the memory options.
        folder: Gets checkpoints, TensorBoard events, the tokenizer and the Hugging Face folder.
        predicted_bytes: The account's peak, shown beside the measured one.
        budget_bytes: What one device may take, shown beside both; None where nothing was said.
        pictures: PNG files to show in TensorBoard, by title.
        ckpt_path: Where to begin while the folder has no checkpoint of its own.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another plan.
        DivergedError: Too many steps in a row had bad numbers.
        MemoryShortageError: The device has not enough memory; the last checkpoint is whole.
    """
    source = _source(folder, ckpt_path, plan, job.optimizer)
    module = job.new_module()
    module.follow(plan)
    data = job.new_data(plan.memory_options)
    data.setup()
    save_tokenizer(data.tokenizer, folder.tokenizer)
    logger = TensorBoardLogger(folder.path, name="", version="", default_hp_metric=False)
    memory = MemoryMonitor(predicted_bytes, budget_bytes=budget_bytes)
    throughput = Throughput()
    limits = {key: getattr(job.model, key) for key in LIMITS}
    spike_guard = SpikeGuard(StepPolicy(**limits), folder.last_checkpoint)
    wants_progress = job.trainer.has_progress_bar
    shown = [progress(throughput, memory)] if wants_progress else []
    trainer = job.new_trainer(
        plan.memory_options,
        [
            spike_guard,  # before all that looks at gradients, or saves
            *_callbacks(folder, job),
            # What it reads and draws is no part of the run, so it is done before anything counts.
            TensorBoardLayout(folder.path, pictures or {}, throughput),
            memory,
            throughput,
            *shown,
            Export(folder.hf),
        ],
        logger=logger,
        enable_progress_bar=any(isinstance(one, StepBar) for one in shown),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        enable_model_summary=False,
        default_root_dir=folder.path,
    )
    with memory_shortage_context("training", plan, trainer), stop_workers_on_signal(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=source, weights_only=True)
        if trainer.global_step % _steps_between_checkpoints(job):
            trainer.save_checkpoint(folder.last_checkpoint)
        loss, num_tokens = validate(trainer, module, data)
    logger.log_hyperparams(
        hyperparameters(job, module, plan, budget_bytes),
        final_metrics(loss, memory.measured_bytes, throughput.tokens_per_second),
        step=trainer.global_step,
    )
    logger.finalize("success")
    if trainer.is_global_zero:  # the last one is of the last step
        previous_checkpoint(folder.last_checkpoint).unlink(missing_ok=True)
    return Trained(
        memory.measured_bytes,
        loss,
        num_tokens,
        throughput.tokens_per_second,
        spike_guard.judge.skipped,
        spike_guard.judge.rollbacks,
    )


def validate(trainer: Trainer, module: LlamaFoam, data: TextData) -> tuple[float, int]:
    """Evaluate: mean nats per token, and over how many tokens."""
    count = _TokenCount()
    trainer.callbacks.append(count)  # type: ignore[attr-defined]
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return float(metrics["validation/loss"]), count.num_tokens


def versions() -> dict[str, str]:
    """List the versions that the result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _source(
    folder: RunFolder, ckpt_path: Path | None, plan: FoldPlan, optimizer: str
) -> Path | None:
    """Find the checkpoint to go on from; reading it says what is wrong with it in one line."""
    start = resume_point(folder.last_checkpoint)
    if start is None and ckpt_path is not None:
        start = IntactCheckpoint(ckpt_path, read_checkpoint(ckpt_path))
    if start is None:
        return None
    check_plan(start.path, start.content, plan, optimizer)
    return start.path


class _TokenCount(Callback):
    def __init__(self) -> None:
        self.num_tokens = 0

    def on_validation_batch_end(self, *args: object, **_: object) -> None:
        outputs = args[2]
        if isinstance(outputs, Mapping):
            self.num_tokens += int(outputs["num_tokens"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counted = torch.tensor(self.num_tokens, device=pl_module.device)
        self.num_tokens = int(trainer.strategy.reduce(counted, reduce_op="sum"))


def _callbacks(folder: RunFolder, job: Job) -> Sequence[Callback]:
    return [
        ModelCheckpoint(
            folder.checkpoints,
            every_n_train_steps=_steps_between_checkpoints(job),
            save_top_k=0,
            save_last=True,
            enable_version_counter=False,
        ),
        ResidualEnergy(),
        ExactResume(),
        SaveOnSignal(folder.last_checkpoint),
    ]


def _steps_between_checkpoints(job: Job) -> int:
    return max(1, min(1000, job.max_steps // 8))
