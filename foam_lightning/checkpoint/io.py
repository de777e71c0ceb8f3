"""Checkpoints on disk: written atomically and checked, with the previous one as a backup."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from typing_extensions import override

from foam_lightning.storage.atomic import atomic_path


def previous_checkpoint(path: Path) -> Path:
    """Name the checkpoint that `path` was before it was last written."""
    return path.with_name(f"previous{path.suffix}")


def find_damage(path: Path, *, thorough: bool) -> str | None:
    """Find what is wrong with the file of a checkpoint; None if nothing is.

    Args:
        path: The file.
        thorough: Compare every byte with its checksum, which torch does not do: some seconds for
            ten gigabytes. Else look at the directory at its end, which takes no time and finds a
            file that was cut off.

    Raises:
        OSError: It cannot be read at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if thorough else None
    except (zipfile.BadZipFile, ValueError, EOFError):
        return "truncated or no checkpoint"
    return None if damaged is None else f"damaged, as the checksum of its {damaged} says"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write so that there is a whole checkpoint at every moment, whenever the process is killed.

    A checkpoint goes to the disk beside its name, and gets that name when all of it is there. What
    had the name before is kept as `previous_checkpoint`.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: It cannot be written; what was there before still is.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        backup = previous_checkpoint(target)
        with atomic_path(target, backup=backup, exclusive=True) as temporary:
            _write(checkpoint, temporary)
            if (reason := find_damage(temporary, thorough=False)) is not None:
                raise OSError(f"cannot write {target}: what was written is {reason}")


def with_atomic_io(plugins: Any) -> list[Any]:
    """Add `AtomicCheckpointIO` to plugins of Lightning's Trainer that write no checkpoints.

    Args:
        plugins: One, a list, or None.
    """
    found = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    writes = any(isinstance(plugin, CheckpointIO) for plugin in found)
    return found if writes else [*found, AtomicCheckpointIO()]


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        # A file of Python's: one that torch opens by its name does not say what went wrong.
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # After a failure torch ends its archive all the same, in vain.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise
