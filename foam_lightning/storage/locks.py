"""Locks between processes."""

from pathlib import Path

from filelock import FileLock


def file_lock(path: Path) -> FileLock:
    """Make a lock that the system releases however its process ends.

    It uses flock(2) or fails: the fallback, a file that exists, would outlive a killed process.

    Args:
        path: The lock file; it is created when the lock is taken.
    """
    return FileLock(path, fallback_to_soft=False)
