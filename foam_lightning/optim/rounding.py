"""Rounding at random, so that a change smaller than half a unit is not lost but made now and then.

A weight in bfloat16 has 8 bits: an update below 1/512 of it would round away, step after step.
Rounded up with the probability of the part that is cut off, its mean is exact.

The noise is a hash of the element's index and a seed, not a draw from torch's generator: a run
that is resumed sees the same noise, no other random number moves, and it compiles into the update.
"""

import torch
from torch import Tensor

# The 32-bit finalizer of MurmurHash3 (Appleby, public domain), its constants as signed numbers;
# indices are first spread by 2**32 over the golden ratio. Multiplication wraps around.
_GOLDEN = -1640531527
_MIX1 = -2048144789
_MIX2 = -1028477387


def noise(like: Tensor, seed: int | Tensor) -> Tensor:
    """Give 32 random bits for each element.

    Args:
        like: The shape and the device.
        seed: An integer of 32 bits with a sign, or a tensor of one.

    Returns:
        int32, the shape of `like`; equal for equal shapes and seeds.
    """
    index = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    bits = index.mul_(_GOLDEN).add_(seed)
    bits ^= _shifted(bits, 16)
    bits *= _MIX1
    bits ^= _shifted(bits, 13)
    bits *= _MIX2
    bits ^= _shifted(bits, 16)
    return bits


def to_bfloat16(x: Tensor, seed: int | Tensor) -> Tensor:
    """Round float32 to one of the two nearest bfloat16, the nearer the likelier.

    What is a bfloat16 stays what it is, infinities and NaN included.

    Args:
        x: float32, any shape.
        seed: See `noise`.
    """
    bits = x.view(torch.int32)
    rounded = (bits + (noise(x, seed) & 0xFFFF)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def to_integer(x: Tensor, seed: int | Tensor) -> Tensor:
    """Round to one of the two nearest integers, the nearer the likelier.

    Args:
        x: float32, any shape.
        seed: See `noise`.

    Returns:
        float32, whole numbers.
    """
    fraction = (noise(x, seed) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)
    return fraction.add_(x).floor_()


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift right, filling with zeros; torch's own shift of a signed number repeats its sign."""
    return (bits >> count) & ((1 << (32 - count)) - 1)
