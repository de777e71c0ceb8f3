"""Errors that the command line prints as one line, and the conversion of other errors to them."""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from foam_lightning.units import at_least, format_bytes, format_bytes_apart

_MAX_CHARACTERS = 1200  # an error that quotes a long name may be far longer


class FoamError(Exception):
    """The base of every error that the command line prints as one line.

    Attributes:
        exit_code: The exit code of the process; 2 is bad usage.
    """

    exit_code = 2


class ConfigError(FoamError):
    """A setting is missing, unknown or out of range, or contradicts another one."""


class DataError(FoamError):
    """The training text cannot be read, or is too short."""


class PlanError(FoamError):
    """A fold plan cannot be read, or was made for another model."""


class CheckpointError(FoamError):
    """A checkpoint or model folder cannot be read or written, or does not match the run."""


class MemoryFallbackError(FoamError):
    """Memory ran out; the same command resumes with the next memory option."""

    exit_code = 4


class StorageError(FoamError):
    """A disk, a file or a data worker failed; the same command resumes."""

    exit_code = 5


class BusyError(FoamError):
    """Another process is using the folder."""

    exit_code = 6


class DivergedError(FoamError):
    """Too many steps had a loss or gradient that is not finite, or a loss spike."""

    exit_code = 7


class UnexpectedError(FoamError):
    """A library, or this program, failed in a way that no check foresaw."""

    exit_code = 1

    @classmethod
    def from_error(cls, error: BaseException, traceback: Path | None = None) -> Self:
        """Describe an error of any type.

        Args:
            error: The error.
            traceback: The file with its traceback; None if there is none.
        """
        lines = str(error).strip().splitlines() or [""]
        # A data worker sends its traceback as the text of the error, which ends with the error.
        text = (
            lines[-1] if "Traceback (most recent call last):" in str(error) else lines[0]
        ).strip()
        name = type(error).__name__
        what = text if text.startswith(name) else f"{name}: {text}".rstrip(": ")
        where = f"is in {traceback}" if traceback else "is shown with --debug"
        return cls(f"unexpected {what.rstrip('.')}; the traceback {where}")


class InfeasibleBudgetError(FoamError):
    """No plan fits the budget even with every memory option on, or the given plan does not fit.

    Args:
        budget_bytes: The memory budget of one device.
        minimum_bytes: The smallest budget that would work.
        binding: The largest term of the peak at that minimum, such as "gradients".
        breakdown: The terms of that minimum, in bytes.
        subject: What needs that much, as the subject of the sentence.
        options: What to lower and what to raise, by the names that the caller gave them.
    """

    exit_code = 3

    def __init__(
        self,
        budget_bytes: int,
        minimum_bytes: int,
        binding: str,
        breakdown: dict[str, int],
        subject: str = "even with every memory option on, this model",
        options: tuple[str, str] = ("data.batch_size", "--memory-budget"),
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
        budget, least = format_bytes_apart(budget_bytes, minimum_bytes)
        super().__init__(
            f"a budget of {budget} is too small: {subject} needs {least} ({terms}); the largest "
            f"term is {binding.replace('_', ' ')}; lower {options[0]}, choose a smaller model, "
            f"or raise {options[1]} to at least {at_least(minimum_bytes)}"
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without its full stop, to quote it in ours."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def one_line(error: BaseException) -> str:
    """Return an error as one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
_FILE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EMFILE}
_RESUME = "fix this, then run the same command again to resume"


def is_disk_error(error: OSError) -> bool:
    """Return whether the disk failed or is full, rather than that a path is wrong."""
    return error.errno in _DISK_ERRORS


def as_storage_error(error: BaseException) -> StorageError | None:
    """Convert an error of a disk, a file, the study's database or a data worker.

    Files are written atomically, so the same command resumes after any of these.

    Args:
        error: What ended the command.

    Returns:
        None for any other error, which is a bug.
    """
    for cause in _causes(error):
        if isinstance(cause, sqlite3.Error):
            return StorageError(f"cannot read or write the search database: {cause}; {_RESUME}")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS | _FILE_ERRORS:
        reason = os.strerror(error.errno)
        what = error.filename or "a file"
        return StorageError(f"cannot read or write {what}: {reason}; {_RESUME}")
    # If the first batch fails, Lightning raises another error while it handles that one.
    for each in (error, error.__context__):
        if isinstance(each, RuntimeError) and (found := re.match(_WORKER_ERROR, str(each))):
            return StorageError(
                f"a data worker failed ({found[0].rstrip('. ')}); run the same command again to "
                "resume, with a lower data.num_workers if host memory ran out"
            )
    return None


# What torch's DataLoader raises where a worker was killed, ended, or has sent nothing for too long.
_WORKER_ERROR = (
    r"DataLoader (worker \(pid(\(s\))? [0-9, ]+\) (is killed by signal: \w+|exited)|timed out)"
    r"[^.\n]*"
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
