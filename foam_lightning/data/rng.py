"""Stateless random numbers derived from a key, so resuming needs no RNG state."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


def random_integer(*key: int) -> int:
    """Return a pseudo-random integer in [0, 2**64) that depends only on the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of 0 to size - 1 that depends only on size and key."""
    return np.random.default_rng(random_integer(*key)).permutation(size)


def weighted_choice(shares: Sequence[float], *key: int) -> int:
    """Return an index, drawn with the given probabilities.

    Args:
        shares: Probabilities that add up to 1.
        key: The only source of randomness.
    """
    drawn = random_integer(*key) / 2**64
    return min(bisect_right(list(accumulate(shares)), drawn), len(shares) - 1)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a number into integers in proportion to shares, by the largest remainder method.

    Args:
        total: The sum of the integers.
        shares: Add up to 1.
    """
    exact = [total * share for share in shares]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts
