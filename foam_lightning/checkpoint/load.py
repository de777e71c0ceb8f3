"""Read a checkpoint back into a model, without the configuration that made it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console

from foam_lightning.checkpoint.io import find_damage, previous_checkpoint
from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import CheckpointError, first_line
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.paths import exists, is_file
from foam_lightning.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = {"fold_plan", "state_dict", "hyper_parameters"}
_EMBEDDING = "model.model.embed_tokens.weight"
_ADVICE = "; use an older one"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load the content of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is something else.
    """
    _find(path)
    try:
        reason = find_damage(path, thorough=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason is not None:
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason}{_ADVICE}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises anything from EOFError to UnpicklingError on a damaged file.
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it is truncated or no checkpoint "
            f"({type(error).__name__}){_ADVICE}"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise CheckpointError(f"{path} holds no fold plan: it is not a checkpoint of this tool")
    _check_kinds(path, content)
    return content


class IntactCheckpoint(NamedTuple):
    """A checkpoint that could be read.

    Attributes:
        path: Its file.
        content: What is in it, tensors on the CPU.
        complaint: What is wrong with the newer one, in whose place it was read; None if nothing is.
    """

    path: Path
    content: dict[str, Any]
    complaint: str | None = None


def find_intact_checkpoint(last: Path) -> IntactCheckpoint | None:
    """Read the checkpoint to go on from: the last one, or if that is damaged the one before.

    Args:
        last: The last checkpoint of a run.

    Returns:
        None where the run has none.

    Raises:
        CheckpointError: None of those that there are can be read.
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


def resume_point(last: Path) -> IntactCheckpoint | None:
    """Do the same, say what is wrong, and put a damaged checkpoint out of the way of the next.

    Args:
        last: The last checkpoint of a run, which no other process trains.

    Raises:
        CheckpointError: None of those that there are can be read.
    """
    found = find_intact_checkpoint(last)
    if found is None or found.complaint is None:
        return found
    aside = last.with_name(f"damaged{last.suffix}")
    if is_first_process():  # none of the others needs it: they see that it is damaged, or gone
        last.replace(aside)
    Console(soft_wrap=True).print(
        f"{found.complaint}; it is {aside.name} now, and the run goes on from the one before, "
        f"of step {found.content['global_step']}",
        highlight=False,
        markup=False,
    )
    return found


def check_plan(path: Path, content: Mapping[str, Any], plan: FoldPlan, optimizer: str) -> None:
    """Refuse a checkpoint that would go on by a plan of its own, or that another one wrote.

    Args:
        path: Its file.
        content: What is in it.
        plan: The plan to go on by.
        optimizer: The optimizer to go on with.

    Raises:
        CheckpointError: It would.
    """
    wrote = content["hyper_parameters"].get("optimizer", "foam")
    if wrote != optimizer:
        raise CheckpointError(
            f"the checkpoint {path} holds the state of {wrote}, not of {optimizer}; go on with "
            f"--model.optimizer {wrote}, or start from its exported model (model.pretrained)"
        )
    saved = FoldPlan.from_json(content["fold_plan"], source=f"the fold plan in {path}")
    for key in ("model", "levels", "scales", "lr"):
        if getattr(saved, key) != getattr(plan, key):
            raise CheckpointError(
                f"the checkpoint {path} was trained by another plan: its {key} differ; pass its "
                "own fold_plan.json or start a new run"
            )


def load_module(path: Path) -> LlamaFoam:
    """Build the model that a checkpoint holds, in its weights' own dtype.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not hold the model it names.
    """
    content = read_checkpoint(path)
    try:
        module = LlamaFoam(**content["hyper_parameters"])
        module.follow(FoldPlan.from_json(content["fold_plan"], source=f"the fold plan in {path}"))
    except (TypeError, ValueError, AttributeError) as error:  # what comes of settings of any kind
        raise CheckpointError(
            f"the hyper_parameters in {path} make no model: {first_line(error)}; use another one"
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


def _find(path: Path) -> None:
    if not is_file(path):
        raise CheckpointError(f"there is no checkpoint {path}; runs keep theirs in checkpoints/")


def _check_kinds(path: Path, content: dict[str, Any]) -> None:
    """Refuse what other programs have left under the names that are looked for.

    Raises:
        CheckpointError: There is no text of a plan, no mapping of settings, or no weights.
    """
    settings, weights = content["hyper_parameters"], content["state_dict"]
    if not isinstance(content["fold_plan"], str):
        raise CheckpointError(f"the fold plan in {path} is no text; use another checkpoint")
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise CheckpointError(f"the hyper_parameters in {path} are no settings; use another one")
    first = weights.get(_EMBEDDING) if isinstance(weights, dict) else None
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise CheckpointError(
            f"the weights in {path} are not those of a model: there is no {_EMBEDDING} of floats"
        )


def folder_of(path: Path) -> RunFolder:
    """Find the run folder that a checkpoint lies in: the parent of `checkpoints/`."""
    return RunFolder(path.resolve().parent.parent)


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that was kept beside a checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or its run folder holds no tokenizer, a broken one,
            or one with code of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    _find(path)
    folder = folder_of(path).tokenizer
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no tokenizer in {folder}; leave the checkpoint in its run folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a broken tokenizer.json raises a plain Exception
        raise CheckpointError(
            f"cannot load the tokenizer in {folder}: {first_line(error)}; use another checkpoint"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{folder} does not hold a tokenizer")
    return tokenizer
