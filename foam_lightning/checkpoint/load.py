"""Read checkpoints, recover from damaged ones, and load a model without its configuration."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console

from foam_lightning.checkpoint.io import find_damage, previous_checkpoint
from foam_lightning.data import tokenizer as tokenizers
from foam_lightning.data.saved import has_tokenizer, peek_checkpoint, saved_settings
from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import CheckpointError, DataError, first_line
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.settings import ModelSettings
from foam_lightning.storage.paths import exists, is_file, is_folder
from foam_lightning.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = {"fold_plan", "state_dict", "hyper_parameters"}
_EMBEDDING = "model.model.embed_tokens.weight"
_ADVICE = "; use an older checkpoint"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load the content of a checkpoint, with tensors on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, or not a checkpoint of this tool.
    """
    _check_exists(path)
    try:
        reason = find_damage(path, thorough=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason is not None:
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason}{_ADVICE}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # On a damaged file torch raises anything from EOFError to UnpicklingError.
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it is truncated or not a checkpoint "
            f"({type(error).__name__}){_ADVICE}"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise CheckpointError(f"{path} holds no fold plan: it is not a checkpoint of this tool")
    _check_types(path, content)
    return content


class IntactCheckpoint(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        path: Its file.
        content: Its content, with tensors on the CPU.
        damage: Why the last checkpoint could not be read, if this is the previous one.
    """

    path: Path
    content: dict[str, Any]
    damage: str | None = None


def find_intact_checkpoint(last: Path) -> IntactCheckpoint | None:
    """Read the last checkpoint of a run, or the previous one if the last is damaged or missing.

    Args:
        last: The path of the last checkpoint.

    Returns:
        None if the run has no checkpoint.

    Raises:
        CheckpointError: No checkpoint of the run can be read.
    """
    before = previous_checkpoint(last)
    if not exists(last):
        return IntactCheckpoint(before, read_checkpoint(before)) if exists(before) else None
    try:
        return IntactCheckpoint(last, read_checkpoint(last))
    except CheckpointError as error:
        if not exists(before):
            raise
        return IntactCheckpoint(before, read_checkpoint(before), str(error).removesuffix(_ADVICE))


def recover_checkpoint(last: Path) -> IntactCheckpoint | None:
    """Find the checkpoint to resume from; rename a damaged last one, and print a line about it.

    Args:
        last: The path of the last checkpoint; the caller holds the lock of its run.

    Returns:
        None if the run has no checkpoint.

    Raises:
        CheckpointError: No checkpoint of the run can be read.
    """
    found = find_intact_checkpoint(last)
    if found is None or found.damage is None:
        return found
    aside = last.with_name(f"damaged{last.suffix}")
    if is_first_process():  # the other ranks find it damaged or gone, and do the same otherwise
        last.replace(aside)
    Console(soft_wrap=True).print(
        f"{found.damage}; renamed it to {aside.name}; resuming from the previous checkpoint, of "
        f"step {found.content['global_step']}",
        highlight=False,
        markup=False,
    )
    return found


# The state of an optimizer has the shapes and the meaning that these settings gave it. All others
# may change when a run goes on. A plan has its own levels and scales.
_OF_STATE = ("optimizer", "second_moment", "state_dtype", "weights_dtype", "exclude")
PLAN_SETTINGS = ("level", "scale", "unfolded_scale")


def check_same_settings(
    path: Path, saved: Mapping[str, Any], settings: ModelSettings, *, has_plan: bool = False
) -> None:
    """Check that the state in a checkpoint is of the settings that are to go on with it.

    Args:
        path: The file, for the error.
        saved: The settings in the checkpoint; a checkpoint of an older version lacks some.
        settings: The settings to go on with.
        has_plan: A plan is given, which has the levels and the scales.

    Raises:
        CheckpointError: One of the settings that must stay differs.
    """
    before = {"optimizer": "foam", "weights_dtype": None, **saved}
    for name in (*_OF_STATE, *(() if has_plan else PLAN_SETTINGS)):
        value = getattr(settings, name)
        if name in before and not is_same(before[name], value):
            now, then = format_setting(value), format_setting(before[name])
            raise CheckpointError(
                f"model.{name} is {now}, and the training state in {path} was made with {then}; "
                f"go on with --model.{name} {then}, or start a new run from the exported model "
                "(model.pretrained)"
            )


def is_same(before: object, after: object) -> bool:
    """Whether two values of a setting are equal, be they read from YAML or from a checkpoint."""
    return format_setting(before) == format_setting(after)


def format_setting(value: object) -> str:
    """Write the value of a setting as on the command line."""
    return json.dumps(value).replace(" ", "").strip('"')


def check_same_plan(
    path: Path,
    content: Mapping[str, Any],
    plan: FoldPlan,
    *,
    may_change: Collection[str] = (),
) -> None:
    """Check that a checkpoint was trained by the plan that is to resume it.

    Args:
        path: The file, for the error.
        content: Its content.
        plan: The plan to resume with.
        may_change: What may differ of "scales" and "lr".

    Raises:
        CheckpointError: It was trained by another plan.
    """
    saved = FoldPlan.from_json(content["fold_plan"], source=f"the fold plan in {path}")
    for key in ("model", "levels", "scales", "lr"):
        if key not in may_change and getattr(saved, key) != getattr(plan, key):
            raise CheckpointError(
                f"the checkpoint {path} was trained by another plan: {key} differ; pass the "
                "fold_plan.json of its run, or start a new run"
            )
    dtypes = [one.memory_options.weights_dtype for one in (saved, plan)]
    if dtypes[0] != dtypes[1]:
        raise CheckpointError(
            f"the checkpoint {path} was trained with weights_dtype {format_setting(dtypes[0])}, "
            f"and the plan has {format_setting(dtypes[1])}; pass the fold_plan.json of its run, or "
            "start a new run"
        )


def load_module(path: Path) -> LlamaFoam:
    """Build the model of a checkpoint, in the dtype of its weights.

    Raises:
        CheckpointError: The checkpoint cannot be read, or its weights do not fit its model.
    """
    content = read_checkpoint(path)
    try:
        module = LlamaFoam(**content["hyper_parameters"])
        module.set_plan(FoldPlan.from_json(content["fold_plan"], source=f"the fold plan in {path}"))
    except (TypeError, ValueError, AttributeError) as error:  # from settings of any content
        raise CheckpointError(
            f"cannot build a model from the hyper_parameters in {path}: {first_line(error)}; use "
            "another checkpoint"
        ) from error
    weights = content["state_dict"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(weights[_EMBEDDING].dtype)
    try:
        module.configure_model()
    finally:
        torch.set_default_dtype(before)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit its model: {reason}") from error
    return module


def _check_exists(path: Path) -> None:
    if not is_file(path):
        raise CheckpointError(f"there is no checkpoint {path}; runs write theirs to checkpoints/")


def _check_types(path: Path, content: dict[str, Any]) -> None:
    """Check the types of what is read from a checkpoint, which another program may have written."""
    settings, weights = content["hyper_parameters"], content["state_dict"]
    if not isinstance(content["fold_plan"], str):
        raise CheckpointError(f"the fold plan in {path} is not a string; use another checkpoint")
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise CheckpointError(
            f"the hyper_parameters in {path} are not a mapping; use another checkpoint"
        )
    first = weights.get(_EMBEDDING) if isinstance(weights, dict) else None
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise CheckpointError(
            f"the weights in {path} have no floating-point {_EMBEDDING}; use another checkpoint"
        )


def run_folder_of(path: Path) -> RunFolder:
    """Return the run folder of a checkpoint: the parent of `checkpoints/`."""
    return RunFolder(path.resolve().parent.parent)


def find_tokenizer(path: Path, content: Mapping[str, Any]) -> str | None:
    """Return what to set `data.tokenizer` to for the tokenizer of a checkpoint.

    Args:
        path: The checkpoint.
        content: Its content.

    Returns:
        The checkpoint itself, or for one of an older version the folder in its run folder; None if
        there is neither.
    """
    if has_tokenizer(content):
        return str(path)
    folder = run_folder_of(path).tokenizer
    return str(folder) if is_folder(folder) else None


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a checkpoint.

    Raises:
        CheckpointError: The checkpoint or its tokenizer is missing, or the tokenizer is damaged or
            needs code of its own.
    """
    _check_exists(path)
    content = peek_checkpoint(path) or {}
    name = find_tokenizer(path, content)
    if name is None and saved_settings(content).get("class_path"):
        raise CheckpointError(
            f"{path} has no tokenizer, because its data module has none; its run folder has the "
            "model without one in hf/, and training with data.tokenizer saves one"
        )
    if name is None:
        raise CheckpointError(
            f"{path} has no tokenizer, as it is of an older version, and there is none in "
            f"{run_folder_of(path).tokenizer}; put it back in the checkpoints/ of its run folder"
        )
    try:
        return tokenizers.load_tokenizer(name)
    except DataError as error:
        raise CheckpointError(f"{first_line(error)}") from error
