"""Checkpoint files: written atomically, with the previous one as a backup, and checked."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint
from typing_extensions import override

from foam_lightning.errors import CheckpointError
from foam_lightning.storage.atomic import atomic_path


def previous_checkpoint(path: Path) -> Path:
    """Return the path of the backup: what `path` was before it was last written."""
    return path.with_name(f"previous{path.suffix}")


def find_damage(path: Path, *, thorough: bool) -> str | None:
    """Check the file of a checkpoint, which is a zip archive.

    Args:
        path: The file.
        thorough: Compare every byte with its CRC-32, which torch does not do: some seconds for 10
            GB. Otherwise only the directory at its end is read, which finds a truncated file.

    Returns:
        What is wrong with it; None if nothing is.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if thorough else None
    except (zipfile.BadZipFile, ValueError, EOFError):
        return "truncated or not a checkpoint"
    return None if damaged is None else f"damaged (wrong checksum of {damaged})"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that an intact one exists whenever the process is killed.

    The one that is replaced is kept as `previous_checkpoint`.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint; if it cannot be, the last one and its backup are unchanged.

        Raises:
            OSError: It cannot be written.
            CheckpointError: It contains an object that no run could read again.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        backup = previous_checkpoint(target)
        with atomic_path(target, backup=backup, exclusive=True) as temporary:
            _write(checkpoint, temporary)
            if (reason := find_damage(temporary, thorough=False)) is not None:
                raise OSError(f"cannot write {target}: what was written is {reason}")
            if unsafe := get_unsafe_globals_in_checkpoint(temporary):
                raise CheckpointError(
                    f"cannot save {target}: the state of a callback or data module contains "
                    f"{', '.join(sorted(unsafe))}, and a checkpoint is read without running code; "
                    "let its state_dict() return numbers, texts, lists, dictionaries and tensors"
                )


def add_atomic_io(plugins: Any) -> list[Any]:
    """Add `AtomicCheckpointIO` to Lightning's plugins, unless one of them writes checkpoints.

    Args:
        plugins: One, a list, or None.
    """
    given = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    has_io = any(isinstance(plugin, CheckpointIO) for plugin in given)
    return given if has_io else [*given, AtomicCheckpointIO()]


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        # Opened here, because torch hides the errno of a file that it opens itself.
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # torch then fails to close its archive, and its RuntimeError hides the OSError.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise
