"""Lines about the data on stderr, each printed once."""

import sys
from functools import cache

from foam_lightning.distributed.topology import is_first_process


@cache  # every trial of a search prepares its data again
def print_once(message: str) -> None:
    """Print a line on stderr, in the first process and only the first time."""
    if is_first_process():
        sys.stderr.write(f"{message}\n")
