"""Checkpoints on disk: written beside, looked at, renamed; and the one before is kept."""

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from typing_extensions import override


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
        beside = target.with_name(f"{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, beside)
            if (reason := find_damage(beside, thorough=False)) is not None:
                raise OSError(f"{beside} was written and is {reason}")
            if target.exists():
                _keep(target, previous_checkpoint(target))
            beside.replace(target)
            _sync(target.parent)
        except BaseException:  # a signal, too
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


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
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # After a failure torch ends its archive all the same, in vain.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise


def _keep(target: Path, previous: Path) -> None:
    """Give a file a second name, so that there is no moment in which it has none."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(target)
    except OSError:  # a file system without hard links
        target.replace(previous)


def _sync(folder: Path) -> None:
    """Have the renaming on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
