"""Chance that needs no memory: every number follows from a key, so nothing has to be resumed."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


def number(*key: int) -> int:
    """Draw a whole number below 2**64 that follows from the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def order(size: int, *key: int) -> NDArray[np.int64]:
    """Shuffle 0 to size - 1 by a key."""
    return np.random.default_rng(number(*key)).permutation(size)


def choice(shares: Sequence[float], *key: int) -> int:
    """Choose a position, each as often as its share says.

    Args:
        shares: Add up to 1.
        key: What the choice follows from.
    """
    drawn = number(*key) / 2**64
    return min(bisect_right(list(accumulate(shares)), drawn), len(shares) - 1)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a number into whole parts as near to their shares as can be (largest remainders).

    Args:
        total: What the parts add up to.
        shares: Add up to 1.
    """
    exact = [total * share for share in shares]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts
