"""Adapt a job to the checkpoint that it resumes: its plan, model and tokenizer."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from foam_lightning.callbacks.exact_resume import count_ranks
from foam_lightning.checkpoint.load import (
    check_same_plan,
    find_intact_checkpoint,
    read_checkpoint,
    run_folder_of,
)
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.paths import is_folder


def use_checkpoint_model(job: Job, path: Path, architecture: Mapping[str, Any] | None) -> Job:
    """Use the model and tokenizer of a checkpoint instead of those in the settings.

    Args:
        job: The job to change.
        path: The checkpoint; its tokenizer is in its run folder.
        architecture: The configuration of its model, if that began as a pretrained model.
    """
    tokenizer = run_folder_of(path).tokenizer
    data = replace(job.data, tokenizer=str(tokenizer)) if tokenizer.is_dir() else job.data
    return replace(job, architecture=architecture, data=data)


def replace_missing_pretrained(job: Job, checkpoints: Iterable[Path]) -> Job:
    """Use the model of a checkpoint if the job's pretrained folder no longer exists.

    Args:
        job: Returned unchanged if its folder exists or it has none.
        checkpoints: Checkpoints that it may resume from; the first that exists is used.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    pretrained = job.model.pretrained
    if pretrained is None or is_folder(Path(pretrained)):
        return job
    for path in checkpoints:
        if (found := find_intact_checkpoint(path)) is not None:
            return use_checkpoint_model(
                job, found.path, found.content["hyper_parameters"].get("architecture")
            )
    return job


def load_given_plan(job: Job, ckpt_path: str | None, fold_plan: str | None) -> FoldPlan | None:
    """Load the plan of a checkpoint or else of a file, and spread it over the devices of a job.

    Args:
        job: The job to train.
        ckpt_path: The checkpoint, whose optimizer state has the levels of its plan.
        fold_plan: The file of a plan.

    Returns:
        None if neither is given.

    Raises:
        CheckpointError: The checkpoint cannot be read, or another optimizer wrote it.
        PlanError: The plan cannot be read, or was made for another model.
        ConfigError: The plan's batch cannot be divided among the devices.
    """
    num_devices = None
    if ckpt_path is not None:
        path = Path(ckpt_path)
        saved = read_checkpoint(path)
        plan = FoldPlan.from_json(saved["fold_plan"], source=ckpt_path)
        check_same_plan(path, saved, plan, job.model.optimizer)
        num_devices = count_ranks(saved)
    elif fold_plan is not None:
        plan = FoldPlan.load(Path(fold_plan))
    else:
        return None
    job.new_module().set_plan(plan)
    return job.adapt_plan(plan, num_devices=num_devices)
