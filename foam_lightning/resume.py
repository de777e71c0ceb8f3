"""Adapt a job to the checkpoint that it resumes: its plan, model and tokenizer."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from foam_lightning.callbacks.exact_resume import count_ranks
from foam_lightning.checkpoint.io import previous_checkpoint
from foam_lightning.checkpoint.load import (
    check_same_plan,
    find_intact_checkpoint,
    find_tokenizer,
    read_checkpoint,
)
from foam_lightning.data.saved import (
    TEXT_SETTINGS,
    name_text,
    peek_checkpoint,
    saved_settings,
    settings_to_save,
)
from foam_lightning.data.tokenizer import count_other_ids, load_tokenizer
from foam_lightning.errors import CheckpointError
from foam_lightning.job import Job
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.paths import is_folder


def use_checkpoint_model(job: Job, module: LlamaFoam) -> Job:
    """Use the model of a checkpoint instead of the one in the settings.

    Args:
        job: The job to change.
        module: From `load_module`.
    """
    data = replace(job.data, vocab_size=module.llama_config().vocab_size)
    return replace(job, model=module.settings, architecture=module.architecture, data=data)


def use_checkpoint_tokenizer(job: Job, checkpoints: Iterable[Path]) -> Job:
    """Use the tokenizer of a checkpoint, since its embeddings are of those tokens.

    Args:
        job: The job to change. If its settings name a tokenizer that gives every token of the
            checkpoint the same id, it keeps that one, which may have another chat template.
        checkpoints: Checkpoints that it may start from; the first that can be read is used, and
            the job is returned unchanged if none can.

    Raises:
        CheckpointError: The settings name a tokenizer with other ids; or none, and the checkpoint
            is of an older version and outside its run folder.
        DataError: The tokenizer that the settings name cannot be loaded.
    """
    files = (file for path in checkpoints for file in (path, previous_checkpoint(path)))
    found = next(((file, content) for file in files if (content := peek_checkpoint(file))), None)
    if found is None:
        return job
    path, content = found
    own, named = find_tokenizer(path, content), job.data.tokenizer
    if own is None and named is None and job.model.pretrained is None:
        raise CheckpointError(
            f"{path} has no tokenizer, as it is of an older version, and a new one would not match "
            "its embeddings; put it back in the checkpoints/ of its run folder, or set "
            "data.tokenizer to the tokenizer/ of that run"
        )
    if own is None or (named is not None and named != saved_settings(content).get("tokenizer")):
        if own is not None and named is not None:
            _check_same_ids(named, own, path)
        return job
    return replace(job, data=replace(job.data, tokenizer=own))


def _check_same_ids(named: str, own: str, path: Path) -> None:
    tokenizer = load_tokenizer(own)
    num_other = count_other_ids(tokenizer, load_tokenizer(named))
    if num_other:
        raise CheckpointError(
            f"data.tokenizer {named} gives {num_other} of {len(tokenizer)} tokens of the "
            f"checkpoint {path} another id or none, and its embeddings are of those ids; remove "
            "data.tokenizer to use the tokenizer of the checkpoint"
        )


def use_checkpoint_architecture(job: Job, checkpoints: Iterable[Path]) -> Job:
    """Use the architecture of a checkpoint that began as a pretrained model, without its folder.

    Args:
        job: Returned unchanged if its folder exists, or if it names none and nor did the
            checkpoint.
        checkpoints: Checkpoints that it may start from; the first that exists is used.

    Raises:
        CheckpointError: The folder is missing, and the checkpoint cannot be read.
    """
    pretrained = job.model.pretrained
    if pretrained is None:
        content = next((found for path in checkpoints if (found := peek_checkpoint(path))), {})
        settings = content.get("hyper_parameters")
        architecture = settings.get("architecture") if isinstance(settings, Mapping) else None
        if architecture is None:
            return job
        job = replace(job, architecture=architecture)
        vocab_size = job.new_module().llama_config().vocab_size
        return replace(job, data=replace(job.data, vocab_size=vocab_size))
    if is_folder(Path(pretrained)):
        return job
    for path in checkpoints:
        if (intact := find_intact_checkpoint(path)) is not None:
            return replace(job, architecture=intact.content["hyper_parameters"].get("architecture"))
    return job


def describe_other_text(job: Job, path: Path) -> str | None:
    """Describe what a job trains on, if a checkpoint was trained on something else.

    Args:
        job: The job that starts from the checkpoint.
        path: The checkpoint.
    """
    before, now = saved_settings(peek_checkpoint(path) or {}), settings_to_save(job.data)
    if not before or all(before.get(name) == now[name] for name in TEXT_SETTINGS):
        return None
    return (
        f"{path} was trained on {name_text(before)}; going on with {name_text(now)}, in the tokens "
        "of the checkpoint"
    )


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
