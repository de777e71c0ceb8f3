"""Read a checkpoint back into a model, without the configuration that made it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.errors import CheckpointError
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = {"fold_plan", "state_dict", "hyper_parameters"}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load the content of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: There is no such file, it is truncated, or it is something else.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; runs keep theirs in checkpoints/")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises anything from EOFError to UnpicklingError on a damaged file.
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it is truncated or no checkpoint "
            f"({type(error).__name__}); use an older one"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise CheckpointError(f"{path} holds no fold plan: it is not a checkpoint of this tool")
    return content


def load_module(path: Path) -> LlamaFoam:
    """Build the model that a checkpoint holds, in its weights' own dtype.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not hold the model it names.
    """
    content = read_checkpoint(path)
    module = LlamaFoam(**content["hyper_parameters"])
    module.follow(FoldPlan.from_json(content["fold_plan"], source=str(path)))
    weights = content["state_dict"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(weights["model.model.embed_tokens.weight"].dtype)
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


def folder_of(path: Path) -> RunFolder:
    """Find the run folder that a checkpoint lies in: the parent of `checkpoints/`."""
    return RunFolder(path.resolve().parent.parent)


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that was kept beside a checkpoint.

    Raises:
        CheckpointError: The run folder holds none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    folder = folder_of(path).tokenizer
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no tokenizer in {folder}; leave the checkpoint in its run folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{folder} does not hold a tokenizer")
    return tokenizer
