"""Where everything lies that can be made again: prepared data, compiled kernels."""

import os
from pathlib import Path


def cache_home() -> Path:
    """Name the folder: foam-lightning below $XDG_CACHE_HOME or ~/.cache. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "foam-lightning")
