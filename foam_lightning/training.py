"""The full run: train by a plan, keep checkpoints, validate, and log the results."""

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichModelSummary
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from foam_lightning import __version__
from foam_lightning.callbacks.exact_resume import ExactResume
from foam_lightning.callbacks.export import Export
from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.preemption import SaveOnSignal, stop_workers_on_signal
from foam_lightning.callbacks.progress import StepBar, progress
from foam_lightning.callbacks.residual_energy import ResidualEnergy
from foam_lightning.callbacks.run_end import RunEnd, describe_end, has_run_out_of_time
from foam_lightning.callbacks.spike_guard import LIMITS, SpikeGuard, StepPolicy
from foam_lightning.callbacks.tensorboard import TensorBoardLayout
from foam_lightning.callbacks.throughput import Throughput
from foam_lightning.checkpoint.io import previous_checkpoint
from foam_lightning.checkpoint.load import (
    IntactCheckpoint,
    check_same_plan,
    check_same_settings,
    read_checkpoint,
    recover_checkpoint,
)
from foam_lightning.evaluate import validate
from foam_lightning.job import Job
from foam_lightning.loggers import create_loggers
from foam_lightning.memory.device import memory_shortage_context
from foam_lightning.model.llama import save_tokenizer
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.settings import ModelSettings
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import format_bytes

# What another run may change of a plan when it goes on from a checkpoint.
_RATES = ("scales", "lr")
PROFILE = "profile"  # in the names of what a profiler writes
_PACKAGES = ("torch", "lightning", "transformers", "datasets", "optuna", "tensorboard")


@dataclass(frozen=True)
class TrainingResult:
    """What the full run measured.

    Attributes:
        measured_peak_bytes: The peak of memory; None if no step was left to train.
        final_validation_loss: In nats per token, unbiased.
        validation_tokens: The number of tokens of that mean.
        tokens_per_second: None if no step was left to train.
        steps: Optimizer steps done.
        ended_by: What ended the run before its last step; None if nothing did.
        is_finished: Whether nothing is left: not if `trainer.max_time` ended the run.
        skipped_steps: Steps skipped because of a bad loss or gradient.
        rollbacks: How often the run went back to a checkpoint.
    """

    measured_peak_bytes: int | None
    final_validation_loss: float
    validation_tokens: int
    tokens_per_second: float | None
    steps: int
    ended_by: str | None = None
    is_finished: bool = True
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
) -> TrainingResult:
    """Train by a plan, from the last checkpoint of the folder if it has one.

    Args:
        job: What to train.
        plan: The levels, the learning rate and the memory options.
        folder: Gets checkpoints, TensorBoard events, the tokenizer and the Hugging Face folder.
        predicted_bytes: The predicted peak, logged with the measured one.
        budget_bytes: The memory budget of one device, logged with both; None if there is none.
        pictures: PNG files to show in TensorBoard, by title.
        ckpt_path: The checkpoint to start from while the folder has none.

    Raises:
        ConfigError: Host memory is too small for what the plan keeps there.
        CheckpointError: The checkpoint cannot be read, or was trained by another plan.
        DivergedError: Too many steps in a row had a bad loss or gradient.
        MemoryShortageError: The device has not enough memory; the last checkpoint is intact.
    """
    job.check_host_memory(job.new_accountant().host_bytes(plan))
    source = _find_checkpoint(folder, ckpt_path, plan, job.model)
    module = job.new_module()
    module.set_plan(plan)
    data = job.new_data(plan.memory_options)
    data.setup()
    if data.tokenizer is not None:
        save_tokenizer(data.tokenizer, folder.tokenizer)
    policy = StepPolicy(**{key: getattr(job.model, key) for key in LIMITS})
    memory, throughput = MemoryMonitor(predicted_bytes, budget_bytes=budget_bytes), Throughput()
    callbacks = [
        SpikeGuard(policy, folder.last_checkpoint),  # before all that read gradients, or save
        *_callbacks(folder, job),
        # Before what measures, since what it reads and draws is no part of the training.
        TensorBoardLayout(folder.path, pictures or {}, throughput),
        memory,
        throughput,
        *([progress(throughput, memory)] if job.trainer.has_progress_bar else []),
        Export(folder.hf),
        RunEnd(),  # after all that may stop the run
    ]
    trainer = _new_trainer(job, plan, folder, callbacks)
    with memory_shortage_context("training", plan, trainer), stop_workers_on_signal(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=source, weights_only=True)
        if trainer.global_step % _steps_between_checkpoints(job):
            trainer.save_checkpoint(folder.last_checkpoint)
        is_early = trainer.global_step < job.trainer.max_steps
        loss, num_tokens = validate(trainer, module, data)
    _log_results(
        trainer,
        hyperparameters(job, module, plan, budget_bytes),
        _final_metrics(loss, memory.measured_bytes, throughput.tokens_per_second),
    )
    if trainer.is_global_zero:  # the last checkpoint is of the last step
        previous_checkpoint(folder.last_checkpoint).unlink(missing_ok=True)
    return TrainingResult(
        memory.measured_bytes,
        loss,
        num_tokens,
        throughput.tokens_per_second,
        steps=trainer.global_step,
        ended_by=describe_end(trainer) if is_early else None,
        is_finished=not (is_early and has_run_out_of_time(trainer)),
        skipped_steps=policy.skipped,
        rollbacks=policy.rollbacks,
    )


def _log_results(trainer: Trainer, settings: Mapping[str, Any], metrics: dict[str, float]) -> None:
    """Log the results and, unless `trainer.enable_autolog_hparams` is off, the settings."""
    step, logs_settings = trainer.global_step, trainer.enable_autolog_hparams
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and logs_settings:
            logger.log_hyperparams({**settings}, metrics, step=step)  # one row of its tab HPARAMS
        else:
            if logs_settings:
                logger.log_hyperparams({**settings})
            logger.log_metrics(metrics, step=step)
        logger.finalize("success")


def _find_checkpoint(
    folder: RunFolder, ckpt_path: Path | None, plan: FoldPlan, settings: ModelSettings
) -> Path | None:
    """Find the checkpoint to resume from, and read it whole, so that damage is one line."""
    start = recover_checkpoint(folder.last_checkpoint)
    may_change: Sequence[str] = ()
    if start is None and ckpt_path is not None:
        start, may_change = IntactCheckpoint(ckpt_path, read_checkpoint(ckpt_path)), _RATES
    if start is None:
        return None
    check_same_settings(start.path, start.content["hyper_parameters"], settings, has_plan=True)
    check_same_plan(start.path, start.content, plan, may_change=may_change)
    return start.path


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


def _new_trainer(
    job: Job, plan: FoldPlan, folder: RunFolder, callbacks: Sequence[Callback]
) -> Trainer:
    given = job.trainer.arguments
    shows_summary = bool(given.get("enable_model_summary"))
    return job.new_trainer(
        plan.memory_options,
        [*callbacks, *([RichModelSummary()] if shows_summary else [])],
        logger=create_loggers(job.trainer.loggers, folder),
        profiler=_profiler(given.get("profiler"), folder),
        enable_progress_bar=any(isinstance(callback, StepBar) for callback in callbacks),
        num_sanity_val_steps=given.get("num_sanity_val_steps") or 0,
        check_val_every_n_epoch=(
            None if job.trainer.validates_by_steps else given.get("check_val_every_n_epoch") or 1
        ),
        enable_model_summary=shows_summary,
        default_root_dir=folder.path,
    )


def _profiler(given: Any, folder: RunFolder) -> Any:
    """Make a profiler of Lightning write into the run folder instead of the log."""
    classes = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    if given in classes:
        return classes[given](dirpath=folder.path, filename=PROFILE)
    return given


def _steps_between_checkpoints(job: Job) -> int:
    return max(1, min(1000, job.trainer.max_steps // 8))


def hyperparameters(
    job: Job, module: LlamaFoam, plan: FoldPlan, budget_bytes: int | None
) -> dict[str, str | float]:
    """Return the settings for TensorBoard's tab HPARAMS; every run has all of them.

    The tab takes the names and types of all runs from one of them, so a setting is always a string
    or always a number. It sorts by name and shows five: budget, lr, optimizer, plan and scale.

    Args:
        job: What is trained.
        module: Has the sizes of the model.
        plan: The levels, the learning rate and the memory options.
        budget_bytes: The memory budget; None if there is none.

    Returns:
        The settings by name. `scale` is the most common one of the matrices; another optimizer than
        FOAM has neither a plan nor scales.
    """
    optimizer = job.model.optimizer
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
        "sequences_per_step": job.data.batch_size,
        "state_dtype": plan.memory_options.state_dtype,
        "steps": job.trainer.max_steps,
        "weights": sum(math.prod(shape) for shape in module.shapes.values()),
        "weights_precision": job.trainer.precision,
    }


def _final_metrics(
    validation_loss: float, peak_bytes: int | None, tokens_per_second: float | None
) -> dict[str, float]:
    """Return the final results by their tags; what is None is left out."""
    figures = {
        "final/validation_loss": validation_loss,
        "final/peak_bytes": peak_bytes,
        "final/tokens_per_second": tokens_per_second,
    }
    return {tag: float(figure) for tag, figure in figures.items() if figure is not None}


def describe_plan(levels: Mapping[str, int]) -> str:
    """Describe the levels of a plan in two words: "level 2", or "mixed 0-4".

    Args:
        levels: By parameter name.
    """
    if not levels:
        return "unfolded"
    lowest, highest = min(levels.values()), max(levels.values())
    return f"level {lowest}" if lowest == highest else f"mixed {lowest}-{highest}"


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the installed ones the result depends on."""
    found = {"python": platform.python_version(), "foam-lightning": __version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # such as datasets, which only the Hub needs
            found[name] = version(name)
    return found
