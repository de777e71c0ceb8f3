"""Errors that a person can act on, each one line, and how foreign errors become one."""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator

from foam_lightning.units import ByteSize, at_least, format_bytes

_MOST_CHARACTERS = 1200  # of an error; a name that is repeated in it may be far longer


class FoamError(Exception):
    """The base of every error that the command line prints as one line.

    Attributes:
        exit_code: What the process exits with: 2 for bad usage.
    """

    exit_code = 2


class ConfigError(FoamError):
    """A setting is missing, unknown, or contradicts another one."""


class DataError(FoamError):
    """The training text cannot be read, or is not enough."""


class PlanError(FoamError):
    """A fold plan cannot be read, or was made for another model."""


class CheckpointError(FoamError):
    """A checkpoint or model folder cannot be read or written, or does not match the run."""


class MemoryFallbackError(FoamError):
    """Memory ran out, and the run folder says what to go on with: the same command does."""

    exit_code = 4


class StorageError(FoamError):
    """A disk, a file or a process that reads one failed under a command; it can be repeated."""

    exit_code = 5


class BusyError(FoamError):
    """Another process is at work in the folder."""

    exit_code = 6


class DivergedError(FoamError):
    """Training stopped: losses or gradients are not finite, or spike, beyond the limit."""

    exit_code = 7


class InfeasibleBudgetError(FoamError):
    """No plan fits the budget, with every memory option pulled, or a plan that was given does not.

    Args:
        budget_bytes: What was asked for.
        minimum_bytes: The smallest budget that would work; said rounded up, so that it works.
        binding: The largest term of the peak at that minimum, such as "gradients".
        breakdown: The terms of that minimum, in bytes.
        subject: What needs so much.
    """

    exit_code = 3

    def __init__(
        self,
        budget_bytes: int,
        minimum_bytes: int,
        binding: str,
        breakdown: dict[str, int],
        subject: str = "with every memory option pulled this model",
    ) -> None:
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.binding = binding
        self.breakdown = breakdown
        terms = ", ".join(
            f"{name.replace('_', ' ')} {format_bytes(size)}"
            for name, size in breakdown.items()
            if size
        )
        needed = at_least(minimum_bytes)
        super().__init__(
            f"a budget of {ByteSize(budget_bytes)} is too small: {subject} needs {needed} "
            f"({terms}); the largest term is {binding.replace('_', ' ')}; lower data.batch_size, "
            f"choose a smaller model, or raise --memory-budget to at least {needed}"
        )


def first_line(error: BaseException) -> str:
    """Give what another library says, as far as it goes into a line of ours."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def one_line(error: BaseException) -> str:
    """Give what an error says without line breaks, which names in files may hold, nor endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."


_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
_OF_FILES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EMFILE}
_AGAIN = "once that is mended, type the same command again"


def is_disk_error(error: OSError) -> bool:
    """Tell whether the disk is to blame, and not the name of a file."""
    return error.errno in _OF_DISKS


def as_storage_error(error: BaseException) -> StorageError | None:
    """Say what broke; None where the error is of another kind, and a fault of this program.

    What is written beside and renamed is whole, so the same command goes on.

    Args:
        error: What a command ended with.
    """
    for cause in _causes(error):
        if isinstance(cause, sqlite3.Error):
            return StorageError(f"cannot read or write the study of the search: {cause}; {_AGAIN}")
    if isinstance(error, OSError) and error.errno in _OF_DISKS | _OF_FILES:
        reason = os.strerror(error.errno)
        what = error.filename or "a file"
        return StorageError(f"cannot read or write {what}: {reason}; {_AGAIN}")
    if isinstance(error, RuntimeError) and (found := re.match(_READER, str(error))):
        return StorageError(
            f"a process that reads data is gone ({found[0].rstrip('. ')}), as where memory ran "
            "out; type the same command again, with a lower data.num_workers if it happens again"
        )
    return None


_READER = r"DataLoader worker \(pid(\(s\))? [0-9, ]+\) (is killed by signal: \w+|exited)[^.\n]*"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
