"""What a checkpoint has of its data: the tokenizer, with its chat template, and the settings."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foam_lightning.data.records import name_files
from foam_lightning.errors import CheckpointError, first_line
from foam_lightning.settings import DataSettings
from foam_lightning.storage.paths import expand_user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The keys in a checkpoint: Lightning saves the state of a data module by the name of its class.
_KEYS = ("TextData", "OwnData")
# The settings that say which text it is.
TEXT_SETTINGS = frozenset(
    (
        *("files", "validation_files", "text_column", "dataset", "dataset_config", "sources"),
        *("class_path", "init_args"),
    )
)
_ROW_SETTINGS = TEXT_SETTINGS | {"chat", "streaming", "sequence_length", "packing"}
_PATHS = ("files", "validation_files")
# Settings of a machine, or of the model.
_UNSAVED = {"cache_dir", "num_workers", "micro_batch_size", "vocab_size"}


def state_to_save(
    tokenizer: "PreTrainedTokenizerBase | None", settings: DataSettings
) -> dict[str, Any]:
    """Return the state of a data module for a checkpoint.

    Args:
        tokenizer: Saved as its files, each a tensor of bytes by name; None saves none.
        settings: Saved with absolute paths, so that they hold in any folder.
    """
    with TemporaryDirectory() as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = {
            path.name: torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
            for path in sorted(Path(folder).iterdir())
        }
    return {"tokenizer": files, "settings": settings_to_save(settings)}


def settings_to_save(settings: DataSettings) -> dict[str, Any]:
    """Return the settings that a checkpoint has, with absolute paths.

    Args:
        settings: All settings.
    """
    named = {name: value for name, value in asdict(settings).items() if name not in _UNSAVED}
    sources = named["sources"]
    named["sources"] = sources and [_with_absolute_paths(one) for one in sources]
    return _with_absolute_paths(named)


def name_text(settings: Mapping[str, Any]) -> str:
    """Return a short name of the text that settings from `settings_to_save` are of."""
    if settings.get("class_path"):
        return str(settings["class_path"])
    if settings.get("sources"):
        return f"{len(settings['sources'])} sources"
    if settings.get("files"):
        return name_files(settings["files"])
    return settings.get("dataset") or "the default corpus"


def _with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    def absolute(paths: list[str] | str) -> list[str]:
        listed = [paths] if isinstance(paths, str) else paths
        return [str(expand_user(path).absolute()) for path in listed]

    return {k: absolute(v) if k in _PATHS and v else v for k, v in settings.items()}


def peek_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint, with tensors that are read from disk only when used.

    Returns:
        None if it cannot be read; reading all of it says why.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # on a damaged file torch raises anything from EOFError on
        return None
    return content if isinstance(content, dict) else None


def saved_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data settings that a checkpoint was trained with; {} if it does not have them.

    Args:
        content: The content of the checkpoint.
    """
    settings = _state(content).get("settings")
    known = {field.name for field in fields(DataSettings)} - _UNSAVED
    found = settings.items() if isinstance(settings, Mapping) else ()
    return {name: value for name, value in found if name in known}


def has_same_rows(content: Mapping[str, Any], settings: DataSettings) -> bool:
    """Return whether settings make the rows that a checkpoint was trained on; True if unknown.

    Args:
        content: The content of the checkpoint.
        settings: The settings to go on with.
    """
    before, now = saved_settings(content), settings_to_save(settings)
    for one in (before, now):
        # Which text is held out changes the rows only if it is part of the files.
        one["validation_files"] = one.get("validation_files") is not None
    return not _state(content) or all(before.get(name) == now[name] for name in _ROW_SETTINGS)


def has_tokenizer(content: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has its tokenizer, as all do but those of older versions.

    Args:
        content: The content of the checkpoint.
    """
    return bool(_state(content).get("tokenizer"))


def _state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of the data module in a checkpoint; {} if it has none."""
    states = (content.get(key) for key in _KEYS)
    return next((state for state in states if isinstance(state, Mapping)), {})


def load_saved_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that a checkpoint was trained with, from the checkpoint itself.

    Raises:
        CheckpointError: The checkpoint cannot be read, or has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    content = peek_checkpoint(path)
    if content is None or not has_tokenizer(content):
        raise CheckpointError(
            f"cannot load the tokenizer {str(path)!r}: it is a file, and not a checkpoint that has "
            "a tokenizer; set data.tokenizer to a folder with tokenizer.json"
        )
    with TemporaryDirectory() as folder:
        try:
            _write_files(_state(content)["tokenizer"], Path(folder))
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a broken tokenizer.json raises a plain Exception
            raise CheckpointError(
                f"cannot load the tokenizer in {path}: {first_line(error)}; use another checkpoint"
            ) from error
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(path)
    return tokenizer


def _write_files(files: Mapping[str, Tensor], folder: Path) -> None:
    for name, content in files.items():
        if Path(name).name != name:
            raise ValueError(f"it has the file {name!r}, which is not a plain name")
        (folder / name).write_bytes(content.numpy().tobytes())
