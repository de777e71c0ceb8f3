"""How the two moments are stored: which tensors, in which dtype, and how values are encoded.

Shapes: R rows (any leading dimensions), C columns, K = ceil(C / 2**level) blocks in a row.

In float64, float32 and bfloat16 a moment is one tensor. In int8 it is a tensor of codes and a
float32 tensor of scales, one scale per 256 codes of a row: the largest magnitude among them.

    m = scale * y * |y|     y = code / 127           code in -127 .. 127
    v = scale * y**4        y = code / 255           code in 0 .. 255

The powers place most codes at small magnitudes, where most moments are. Powers instead of a lookup
table (Dettmers et al. 2021, arXiv:2110.02861) are a departure: every kernel can compute them. Codes
are rounded stochastically (see `rounding`): v changes by a thousandth a step, far less than one
code, so that rounding to nearest would never change it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foam_lightning.optim import rounding
from foam_lightning.optim.fold import folded_shape

SecondMoment = Literal["mean_square", "square_mean"]
Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, Moment] = ("exp_avg", "exp_avg_sq")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)

# 256 adds 1.6 % to the bytes of the codes. A scale never spans two rows, so that shards of rows are
# updated independently.
CODES_PER_SCALE = 256


class TensorLayout(NamedTuple):
    """Shape and storage dtype of one tensor of the state."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def state_layout(shape: Sequence[int], level: int, dtype: torch.dtype) -> dict[str, TensorLayout]:
    """Describe the state tensors of one parameter.

    The optimizer allocates by it and the memory account counts by it.

    Args:
        shape: Shape of the parameter. With fewer than two dimensions it is never folded, and its
            moments stay in float32 where `dtype` is int8.
        level: Fold level.
        dtype: torch.float32, torch.bfloat16 or torch.int8; or torch.float64.

    Returns:
        By state key: "exp_avg", "exp_avg_sq", and with int8 "exp_avg_scale", "exp_avg_sq_scale".
    """
    folded = folded_shape(shape, level)
    layout: dict[str, TensorLayout] = {}
    for moment in MOMENTS:
        if dtype != torch.int8:
            layout[moment] = TensorLayout(folded, dtype)
        elif len(shape) < 2 or folded[-1] == 1:  # one scale per value would cost more than float32
            layout[moment] = TensorLayout(folded, torch.float32)
        else:
            codes = torch.int8 if moment == "exp_avg" else torch.uint8
            num_scales = -(-folded[-1] // CODES_PER_SCALE)
            layout[moment] = TensorLayout(folded, codes)
            layout[f"{moment}_scale"] = TensorLayout((*folded[:-1], num_scales), torch.float32)
    return layout


def state_bytes(shape: Sequence[int], level: int, dtype: torch.dtype) -> int:
    """Compute the state bytes of one parameter in closed form; arguments as of `state_layout`."""
    return sum(tensor.nbytes for tensor in state_layout(shape, level, dtype).values())


def read_moment(state: Mapping[str, Tensor], moment: Moment) -> Tensor:
    """Read a moment in float32 or float64; one stored so is returned itself, not a copy.

    Args:
        state: Tensors by the keys of `state_layout`.
        moment: Which of the two.
    """
    stored = state[moment]
    if stored.is_floating_point():
        return stored.to(torch.promote_types(stored.dtype, torch.float32))
    scale = _repeat_scales(state[f"{moment}_scale"], stored)
    if moment == "exp_avg":
        y = stored.float().div_(127)
        return y.abs().mul_(y).mul_(scale)
    return stored.float().div_(255).square_().square_().mul_(scale)


def write_moment_(
    state: Mapping[str, Tensor], moment: Moment, value: Tensor, seed: int | None
) -> None:
    """Store a moment, rounded once.

    Args:
        state: Tensors by the keys of `state_layout`; those of this moment are changed.
        moment: Which of the two.
        value: float32 or float64, the shape of the moment; v is 0 or more.
        seed: Of stochastic rounding, see `rounding`; None rounds to nearest.
    """
    stored = state[moment]
    if stored.dtype == torch.bfloat16 and seed is not None:
        stored.copy_(rounding.to_bfloat16(value.float(), seed))
    elif stored.is_floating_point():
        stored.copy_(value)
    else:
        scale = _largest_magnitudes(value)
        state[f"{moment}_scale"].copy_(scale)
        # The smallest normal number, since zeros alone have scale 0, by which nothing is divided.
        y = value / _repeat_scales(scale.clamp_min(torch.finfo(torch.float32).tiny), value)
        if moment == "exp_avg":
            code, lowest, highest = y.abs().sqrt_().mul_(y.sign()).mul_(127), -127.0, 127.0
        else:
            # At least 1: code 0 would mean v = 0, and the update would be divided by eps alone.
            code, lowest, highest = y.sqrt_().sqrt_().mul_(255), 1.0, 255.0
        code = code.round_() if seed is None else rounding.to_integer(code, seed)
        stored.copy_(code.clamp_(lowest, highest))


def _repeat_scales(scale: Tensor, like_RK: Tensor) -> Tensor:
    return scale.repeat_interleave(CODES_PER_SCALE, dim=-1)[..., : like_RK.shape[-1]]


def _largest_magnitudes(value_RK: Tensor) -> Tensor:
    """Compute the largest magnitude of each CODES_PER_SCALE adjacent values of a row."""
    padding = -value_RK.shape[-1] % CODES_PER_SCALE
    padded = torch.nn.functional.pad(value_RK.abs(), (0, padding)) if padding else value_RK.abs()
    grouped: Tensor = padded.unflatten(-1, (-1, CODES_PER_SCALE))
    return grouped.amax(dim=-1)
