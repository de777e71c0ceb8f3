"""How the two moments are kept: which tensors, in which dtype, and what they mean.

Shapes: R rows (any leading dimensions), C columns, K = ceil(C / 2**level) blocks in a row.

In float32 and bfloat16 a moment is one tensor. With int8 it is a tensor of codes and one of scales
in float32, one scale for each run of up to 256 codes of a row, its largest magnitude:

    m = scale * y * |y|     y = code / 127           code in -127 .. 127
    v = scale * y**4        y = code / 255           code in 0 .. 255

The powers put the codes where moments lie, most of them far below the largest of their run. The
form with powers instead of a table of codes (Dettmers et al. 2021, arXiv:2110.02861) is a
departure: it compiles into the update. Codes are rounded at random (see `rounding`): v moves by a
thousandth a step, far less than a code, and would otherwise never move at all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foam_lightning.optim import rounding
from foam_lightning.optim.fold import folded_shape

SecondMoment = Literal["mean_square", "square_mean", "row", "none"]
Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, Moment] = ("exp_avg", "exp_avg_sq")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)

# Codes that share a scale. 256 adds 1.6 % to their bytes; a run never crosses a row, so that rows
# may be sharded and updated apart.
RUN = 256


class Layout(NamedTuple):
    """One tensor of the state.

    Attributes:
        shape: As folded.
        dtype: What it is stored in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of it."""
        return math.prod(self.shape) * self.dtype.itemsize


def layouts(
    shape: Sequence[int],
    level: int,
    dtype: torch.dtype,
    second_moment: SecondMoment = "mean_square",
) -> dict[str, Layout]:
    """Describe the state tensors of one parameter.

    The optimizer allocates by it and the memory account counts by it.

    Args:
        shape: Shape of the parameter. With fewer than two dimensions it never folds, has both
            moments, and stays in float32 where `dtype` is int8.
        level: Fold level.
        dtype: torch.float32, torch.bfloat16 or torch.int8.
        second_moment: "row" keeps one value a row, "none" keeps none.

    Returns:
        By state key: "exp_avg", "exp_avg_sq", and with int8 "exp_avg_scale", "exp_avg_sq_scale".
    """
    is_matrix = len(shape) >= 2
    found: dict[str, Layout] = {}
    for moment in MOMENTS:
        kept = folded_shape(shape, level)
        if is_matrix and moment == "exp_avg_sq":
            if second_moment == "none":
                continue
            if second_moment == "row":
                kept = (*kept[:-1], 1)
        if dtype != torch.int8:
            found[moment] = Layout(kept, dtype)
        elif not is_matrix or kept[-1] == 1:
            found[moment] = Layout(kept, torch.float32)  # a scale for each would cost more
        else:
            codes = torch.int8 if moment == "exp_avg" else torch.uint8
            found[moment] = Layout(kept, codes)
            found[f"{moment}_scale"] = Layout((*kept[:-1], _runs(kept[-1])), torch.float32)
    return found


def state_bytes(
    shape: Sequence[int],
    level: int,
    dtype: torch.dtype,
    second_moment: SecondMoment = "mean_square",
) -> int:
    """Count the bytes of the state of one parameter, by formula; arguments as of `layouts`."""
    return sum(layout.nbytes for layout in layouts(shape, level, dtype, second_moment).values())


def read(state: Mapping[str, Tensor], moment: Moment) -> Tensor:
    """Give a moment in float32: the stored tensor itself where that is what is stored.

    Args:
        state: Tensors by the keys of `layouts`.
        moment: Which of the two.
    """
    stored = state[moment]
    if stored.is_floating_point():
        return stored.float()
    scale = state[f"{moment}_scale"].repeat_interleave(RUN, dim=-1)[..., : stored.shape[-1]]
    if moment == "exp_avg":
        y = stored.float().div_(127)
        return y.abs().mul_(y).mul_(scale)
    return stored.float().div_(255).square_().square_().mul_(scale)


def write_(
    state: Mapping[str, Tensor], moment: Moment, value: Tensor, seed: int | Tensor | None
) -> None:
    """Store a moment, rounded once.

    Args:
        state: Tensors by the keys of `layouts`; those of this moment are changed.
        moment: Which of the two.
        value: float32, the shape of the moment; v is 0 or more.
        seed: Rounds at random, see `rounding`; None rounds to the nearest.
    """
    stored = state[moment]
    if stored.dtype == torch.bfloat16 and seed is not None:
        stored.copy_(rounding.to_bfloat16(value, seed))
    elif stored.is_floating_point():
        stored.copy_(value)
    else:
        scale = _largest_of_runs(value)
        state[f"{moment}_scale"].copy_(scale)
        # The smallest normal number, because a run of zeros has no scale to divide by.
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        y = value / scale.repeat_interleave(RUN, dim=-1)[..., : value.shape[-1]]
        if moment == "exp_avg":
            code, lowest, highest = y.abs().sqrt_().mul_(y.sign()).mul_(127), -127.0, 127.0
        else:
            # Code 0 would say that all gradients were 0, and divide by eps alone.
            code, lowest, highest = y.sqrt_().sqrt_().mul_(255), 1.0, 255.0
        code = code.round_() if seed is None else rounding.to_integer(code, seed)
        stored.copy_(code.clamp_(lowest, highest))


def _largest_of_runs(value_RK: Tensor) -> Tensor:
    rest = -value_RK.shape[-1] % RUN
    padded = torch.nn.functional.pad(value_RK.abs(), (0, rest)) if rest else value_RK.abs()
    runs: Tensor = padded.unflatten(-1, (-1, RUN))
    return runs.amax(dim=-1)


def _runs(columns: int) -> int:
    return -(-columns // RUN)
