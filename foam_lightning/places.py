"""Whether a path that somebody wrote leads to something; one that cannot, leads to nothing."""

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
