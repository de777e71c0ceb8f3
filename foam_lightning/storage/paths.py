"""Paths: checks that return False instead of raising, and the folder of caches."""

import os
from pathlib import Path


def exists(path: Path) -> bool:
    """Tell whether anything is there."""
    # Unlike pathlib, os.path answers where a name is too long or holds NUL.
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Tell whether an ordinary file is there."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Tell whether a folder is there."""
    return os.path.isdir(path)  # noqa: PTH112


def cache_home() -> Path:
    """Name the folder: foam-lightning below $XDG_CACHE_HOME or ~/.cache. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "foam-lightning")
