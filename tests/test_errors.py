"""Errors that a user can act on are one line with an exit code; bugs are not hidden."""

import errno
import sqlite3
from pathlib import Path

import pytest

from foam_lightning.errors import (
    InfeasibleBudgetError,
    UnexpectedError,
    as_storage_error,
)


def test_an_infeasible_budget_exits_with_3_and_names_what_would_work() -> None:
    breakdown = {"weights": 13 * 10**9, "optimizer_state": 1_500_000_000, "margin": 0}
    error = InfeasibleBudgetError(8 * 10**9, 14_500_000_000, "optimizer_state", breakdown)
    assert error.exit_code == 3
    assert (error.budget_bytes, error.minimum_bytes) == (8 * 10**9, 14_500_000_000)
    assert (error.binding, error.breakdown) == ("optimizer_state", breakdown)
    text = str(error)
    assert "\n" not in text
    for words in ("8 GB", "14.5GB", "weights 13 GB", "largest term is optimizer state"):
        assert words in text
    assert "margin" not in text  # a term of no bytes


def chained(cause: Exception) -> Exception:
    error = RuntimeError("wrapped")
    error.__cause__ = ValueError("wrapped too")
    error.__cause__.__cause__ = cause
    return error


WORKERS = "DataLoader worker (pid(s) 17, 18) exited unexpectedly"
KILLED = "DataLoader worker (pid 17) is killed by signal: Killed"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "", "a/b"), "a/b: No space left on device;"),
        (OSError(errno.EROFS, "", "a"), "a: Read-only file system;"),
        (FileNotFoundError(errno.ENOENT, "", "shard"), "shard: No such file or directory;"),
        (OSError(errno.EIO, ""), "a file: Input/output error;"),
        (chained(sqlite3.OperationalError("database or disk is full")), "disk is full"),
        (RuntimeError(f"{WORKERS}. Maybe more."), f"({WORKERS})"),
        (RuntimeError(f"{KILLED}. "), f"({KILLED})"),
        (RuntimeError("DataLoader timed out after 600 seconds"), "timed out after 600 seconds"),
    ],
)
def test_a_failure_of_disk_or_worker_is_one_line(error: Exception, words: str) -> None:
    found = as_storage_error(error)
    assert found is not None
    assert found.exit_code == 5
    assert words in str(found)
    assert "run the same command again to resume" in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        RuntimeError("shapes differ"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionError("no network"),
        chained(ValueError("a bug")),
    ],
)
def test_other_errors_are_not_converted(error: Exception) -> None:
    assert as_storage_error(error) is None


WORKER = (
    "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
    'last):\n  File "x.py", line 1, in f\nValueError: bad row'
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("shapes differ"), "ValueError: shapes differ;"),
        (RuntimeError("first\n\nsecond"), "RuntimeError: first;"),
        (KeyError(), "KeyError;"),
        (RuntimeError(WORKER), "ValueError: bad row;"),
    ],
)
def test_an_unexpected_error_is_one_line_that_says_where_the_traceback_is(
    error: Exception, words: str
) -> None:
    hidden, saved = (UnexpectedError.from_error(error, path) for path in (None, Path("a/b.txt")))
    assert hidden.exit_code == 1
    for one in (hidden, saved):
        assert words in str(one)
        assert "\n" not in str(one)
    assert "--debug" in str(hidden)
    assert "a/b.txt" in str(saved)
