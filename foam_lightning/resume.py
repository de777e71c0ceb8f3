"""A job that goes on from a checkpoint, and needs no folder that it once began from."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from foam_lightning.callbacks.exact_resume import num_ranks_of
from foam_lightning.checkpoint.load import (
    check_plan,
    find_intact_checkpoint,
    folder_of,
    read_checkpoint,
)
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.paths import is_folder


def with_checkpoint_model(job: Job, path: Path, architecture: Mapping[str, Any] | None) -> Job:
    """Take the model and the tokenizer that were kept, whatever the settings name.

    Args:
        job: What to do with the checkpoint.
        path: The checkpoint; a tokenizer lies beside it while it is in its run folder.
        architecture: Of the model in it, where that began in a pretrained folder.
    """
    tokenizer = folder_of(path).tokenizer
    data = replace(job.data, tokenizer=str(tokenizer)) if tokenizer.is_dir() else job.data
    return replace(job, architecture=architecture, data=data)


def without_pretrained_folder(job: Job, checkpoints: Iterable[Path]) -> Job:
    """Let a checkpoint stand for the pretrained folder where that is gone.

    Args:
        job: What to go on with; returned as it is where its folder is there or it has none.
        checkpoints: Where it may go on from; the first that exists counts.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    pretrained = job.model.pretrained
    if pretrained is None or is_folder(Path(pretrained)):
        return job
    for path in checkpoints:
        if (found := find_intact_checkpoint(path)) is not None:
            return with_checkpoint_model(
                job, found.path, found.content["hyper_parameters"].get("architecture")
            )
    return job


def load_given_plan(job: Job, ckpt_path: str | None, fold_plan: str | None) -> FoldPlan | None:
    """Take the plan that the user has, from a checkpoint or else a file, for the devices of a job.

    Args:
        job: What to train by it.
        ckpt_path: The checkpoint; its levels are those of its optimizer state.
        fold_plan: The file.

    Returns:
        None where there is neither.

    Raises:
        CheckpointError: The checkpoint cannot be read, or another optimizer or plan wrote it.
        PlanError: The plan is of another model, or is none.
        ConfigError: The devices cannot make the batch of the plan.
    """
    if ckpt_path is None and fold_plan is None:
        return None
    path, num_devices = Path(ckpt_path or ""), None
    if ckpt_path is not None:
        saved = read_checkpoint(path)
        plan = FoldPlan.from_json(saved["fold_plan"], source=ckpt_path)
        check_plan(path, saved, plan, job.optimizer)
        num_devices = num_ranks_of(saved)
    else:
        plan = FoldPlan.load(Path(str(fold_plan)))
    job.new_module().follow(plan)
    return job.spread(plan, num_devices=num_devices)
