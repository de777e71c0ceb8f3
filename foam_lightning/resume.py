"""Adapt a job to the checkpoint that it resumes: its plan, model and tokenizer."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foam_lightning.callbacks.exact_resume import count_ranks
from foam_lightning.checkpoint.io import previous_checkpoint
from foam_lightning.checkpoint.load import (
    PLAN_SETTINGS,
    check_same_plan,
    check_same_settings,
    find_intact_checkpoint,
    find_tokenizer,
    format_setting,
    is_same,
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
from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.job import Job
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.storage.paths import exists, is_folder

_MEMORY_SETTINGS = ("gradient_release", "grad_offload", "state_offload")


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
            checkpoint the same id, it keeps that one, which may have another chat template. One
            that is gone, or is on the Hub, is not needed if the checkpoint was trained with it.
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
    may_have_none = job.model.pretrained is not None or job.data.class_path is not None
    if own is None and named is None and not may_have_none:
        raise CheckpointError(
            f"{path} has no tokenizer, as it is of an older version, and a new one would not match "
            "its embeddings; put it back in the checkpoints/ of its run folder, or set "
            "data.tokenizer to the tokenizer/ of that run"
        )
    if own is None:
        return job
    is_other = named is not None and named != saved_settings(content).get("tokenizer")
    if named is not None and (is_other or exists(Path(named))):
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


def load_plan(job: Job, path: str) -> FoldPlan:
    """Load a plan from a file, and spread it over the devices of a job.

    Args:
        job: The job to train.
        path: The file.

    Raises:
        PlanError: The plan cannot be read, or was made for another model.
        ConfigError: The plan's batch cannot be divided among the devices.
    """
    plan = FoldPlan.load(Path(path))
    job.new_module().set_plan(plan)
    return job.adapt_plan(plan)


@dataclass(frozen=True)
class ResumedPlan:
    """The plan by which a job goes on from a checkpoint.

    Attributes:
        plan: The levels of the checkpoint, with the learning rate and the memory options of the
            job where these differ from those of the run that wrote it.
        step: Optimizer steps of the checkpoint.
        changes: The settings that differ, such as "model.lr 0.001 (was 0.02)".
    """

    plan: FoldPlan
    step: int
    changes: Sequence[str]

    def check_steps_left(
        self, path: Path, max_steps: int, *, ended_by_epochs: bool = False
    ) -> None:
        """Check that the run does not end before it begins.

        Args:
            path: The checkpoint, for the error.
            max_steps: Optimizer steps of the run.
            ended_by_epochs: They follow from `trainer.max_epochs`.

        Raises:
            ConfigError: The checkpoint is at or past the end.
        """
        if self.step >= max_steps:
            raised = "max_epochs" if ended_by_epochs else f"max_steps above {self.step}"
            raise ConfigError(
                f"nothing is left to train: the checkpoint {path} is of step {self.step}, and the "
                f"run ends at step {max_steps}; raise --trainer.{raised}"
            )


def resume_plan(
    job: Job, ckpt_path: Path, fold_plan: str | None = None, *, is_budgeted: bool = False
) -> ResumedPlan:
    """Find the plan by which a job goes on from the checkpoint of another run.

    The settings of the job count, as in any run; those that the state in the checkpoint was made
    with must be the same.

    Args:
        job: The job to train.
        ckpt_path: The checkpoint.
        fold_plan: The file of a plan with the same levels, whose learning rate, scales and memory
            options replace those of the checkpoint.
        is_budgeted: The memory options of the checkpoint stay, since they were chosen for a budget.

    Raises:
        CheckpointError: The checkpoint cannot be read, or its state is of other settings.
        PlanError: A plan cannot be read, or was made for another model.
        ConfigError: The plan's batch cannot be divided among the devices.
    """
    content = read_checkpoint(ckpt_path)
    saved = FoldPlan.from_json(content["fold_plan"], source=str(ckpt_path))
    before = content["hyper_parameters"]
    check_same_settings(ckpt_path, before, job.model, has_plan=fold_plan is not None)
    of_plan = ("lr", *PLAN_SETTINGS) if fold_plan is not None else ()
    of_memory = _MEMORY_SETTINGS if fold_plan is not None or is_budgeted else ()
    changes = _changes(before, job, unused=(*of_plan, *of_memory))
    if fold_plan is not None:
        plan = load_plan(job, fold_plan)
        check_same_plan(ckpt_path, content, plan, may_change=("scales", "lr"))
    else:
        # Unless another rate is asked for, the one that the tuner may have found stays.
        plan = replace(saved, lr=job.model.lr) if before.get("lr") != job.model.lr else saved
        job.new_module().set_plan(plan)
        plan = job.adapt_plan(plan, num_devices=count_ranks(content))
        if not is_budgeted:
            options = _memory_options(job, plan.memory_options, before)
            plan = replace(plan, memory_options=options)
    step = content.get("global_step")
    if not isinstance(step, int):
        raise CheckpointError(f"{ckpt_path} holds no global_step; use a checkpoint of this tool")
    return ResumedPlan(plan, step, changes)


def _changes(before: Mapping[str, Any], job: Job, *, unused: Collection[str]) -> list[str]:
    """Describe the settings of the model that count and differ from those in a checkpoint."""
    after = asdict(job.model)
    return [
        f"model.{name} {format_setting(after[name])} (was {format_setting(value)})"
        for name, value in before.items()
        if name in after and name not in ("pretrained", *unused)
        if not is_same(value, after[name])
    ]


def _memory_options(job: Job, options: MemoryOptions, before: Mapping[str, Any]) -> MemoryOptions:
    """Replace the memory options that the settings ask for."""
    own = job.memory_options
    names = [
        name for name in _MEMORY_SETTINGS if getattr(job.model, name) != before.get(name, False)
    ]
    if "grad_offload" in names:
        names.append("gradient_release")  # which it turns on
    if job.data.micro_batch_size is not None:
        names += ["micro_batch_size", "accumulate_grad_batches"]
    return replace(options, **{name: getattr(own, name) for name in names})
