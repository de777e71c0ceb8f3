"""Stochastic rounding: up with the probability of the part that is cut off, so the mean is exact.

A weight in bfloat16 has 8 significant bits: rounded to nearest, an update below 1/512 of the weight
is lost, step after step.

The random bits are a hash of the element's index and a seed, not a draw from torch's generator: a
resumed run sees the same bits, no other random number changes, and every kernel can compute them.
"""

import torch
from torch import Tensor

# The 32-bit finalizer of MurmurHash3 (Appleby, public domain), its constants as signed numbers;
# indices are first multiplied by 2**32 over the golden ratio. Multiplication wraps around.
GOLDEN = -1640531527
MIX1 = -2048144789
MIX2 = -1028477387


def random_bits(like: Tensor, seed: int) -> Tensor:
    """Hash seed and position to 32 random bits for each element.

    Args:
        like: Has the shape and the device of the result.
        seed: A signed 32-bit integer.

    Returns:
        int32, the shape of `like`; equal for equal shapes and seeds.
    """
    index = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    bits = index.mul_(GOLDEN).add_(seed)
    bits ^= _shift_right(bits, 16)
    bits *= MIX1
    bits ^= _shift_right(bits, 13)
    bits *= MIX2
    bits ^= _shift_right(bits, 16)
    return bits


def seed_at(seed: int, first: int) -> int:
    """Compute the seed that gives a part of a tensor the bits that it has in the whole tensor.

    Args:
        seed: The seed of the whole tensor, a signed 32-bit integer.
        first: Index of the first element of the part.
    """
    return (seed + first * GOLDEN + 2**31) % 2**32 - 2**31


def to_bfloat16(x: Tensor, seed: int) -> Tensor:
    """Round float32 to one of its two neighbours in bfloat16, the nearer the likelier.

    Values that bfloat16 represents exactly do not change, infinities and NaN included.

    Args:
        x: float32, any shape.
        seed: See `random_bits`.
    """
    bits = x.view(torch.int32)
    rounded = (bits + (random_bits(x, seed) & 0xFFFF)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def to_integer(x: Tensor, seed: int) -> Tensor:
    """Round to one of the two neighbouring integers, the nearer the likelier.

    Args:
        x: float32, any shape.
        seed: See `random_bits`.

    Returns:
        Integers in float32.
    """
    fraction = (random_bits(x, seed) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)
    return fraction.add_(x).floor_()


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift of a signed number repeats its sign."""
    return (bits >> count) & ((1 << (32 - count)) - 1)
