"""What broke is one line with a code of its own; a fault of the program is not hidden."""

import errno
import sqlite3

import pytest

from foam_lightning.errors import as_storage_error

GONE = "DataLoader worker (pid(s) 17, 18) exited unexpectedly. Maybe more."
KILLED = "DataLoader worker (pid 17) is killed by signal: Killed. "


def chained(cause: Exception) -> Exception:
    error = RuntimeError("wrapped")
    error.__cause__ = ValueError("wrapped too")
    error.__cause__.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "", "a/b"), "cannot read or write a/b: No space left on device;"),
        (OSError(errno.EROFS, "", "a"), "cannot read or write a: Read-only file system;"),
        (FileNotFoundError(errno.ENOENT, "", "shard"), "shard: No such file or directory;"),
        (OSError(errno.EIO, ""), "cannot read or write a file: Input/output error;"),
        (chained(sqlite3.OperationalError("database or disk is full")), "the study of the search"),
        (RuntimeError(GONE), "(DataLoader worker (pid(s) 17, 18) exited unexpectedly), as where"),
        (RuntimeError(KILLED), "(DataLoader worker (pid 17) is killed by signal: Killed), as"),
    ],
)
def test_what_broke_is_one_line(error: Exception, expected: str) -> None:
    found = as_storage_error(error)
    assert found is not None
    assert expected in str(found)
    assert "type the same command again" in str(found)
    assert "\n" not in str(found)
    assert found.exit_code == 5


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a fault"),
        RuntimeError("shapes differ"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionError("no network"),
        chained(ValueError("a fault")),
    ],
)
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    assert as_storage_error(error) is None
