"""Path checks that return False for invalid paths instead of raising, and the cache folder."""

import os
from pathlib import Path


def exists(path: Path) -> bool:
    """Return whether the path exists."""
    # Unlike pathlib, os.path does not raise if a name is too long or contains NUL.
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Return whether the path is a regular file."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Return whether the path is a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def expand_user(name: str) -> Path:
    """Return a path with ~ replaced by the home folder, and unchanged for an unknown user."""
    # Unlike pathlib, os.path does not raise for an unknown user.
    return Path(os.path.expanduser(name))  # noqa: PTH111


def cache_home() -> Path:
    """Return foam-lightning below $XDG_CACHE_HOME or ~/.cache, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "foam-lightning")
