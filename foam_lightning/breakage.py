"""What broke under a command, in one line: the disk, a file, a process that reads data."""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator

from foam_lightning.errors import StorageError

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
_OF_FILES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EMFILE}
_AGAIN = "once that is mended, type the same command again"


def is_of_disk(error: OSError) -> bool:
    """Tell whether the disk is to blame, and not the name of a file."""
    return error.errno in _OF_DISKS


def breakage(error: BaseException) -> StorageError | None:
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
