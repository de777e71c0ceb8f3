"""Folding: the mean over blocks of adjacent columns, and unfolding back to the full shape.

Shapes: R rows (any leading dimensions), C columns, K = ceil(C / 2**level) blocks in a row.

Source: FOAM (Wen et al. 2025, arXiv:2512.07112). Departure: where 2**level does not divide C, the
last block is the mean over the columns that exist. The released code pads it with zeros and
divides by 2**level, so its mean is too small and `fold(unfold(s)) == s` fails.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

# Up to this width, adding strided columns is up to 5 times faster on CPU than a mean over so short
# an axis.
_MAX_STRIDED_WIDTH = 4
_MAX_LEVEL = 62  # 2**63 does not fit a signed 64-bit integer


def num_blocks(columns: int, level: int) -> int:
    """Count the blocks of a row: ceil(columns / 2**level).

    Args:
        columns: Number of columns, 1 or more.
        level: Fold level, 0 or more. A block wider than the row is the whole row ("row fold").

    Raises:
        ValueError: `columns` or `level` is out of range.
    """
    check_level(level)
    if columns < 1:
        raise ValueError(f"folding needs at least one column, got {columns} columns")
    return -(-columns // (1 << level))


def folded_shape(shape: Sequence[int], level: int) -> tuple[int, ...]:
    """Compute the shape of one moment of a parameter.

    The optimizer allocates by it and the memory account counts by it.

    Args:
        shape: Shape of the parameter. With fewer than two dimensions it is never folded.
        level: Fold level, 0 or more.

    Returns:
        `shape` with its last dimension replaced by the number of blocks.

    Raises:
        ValueError: `level` is out of range, or a matrix has no columns and `level` is above 0.
    """
    check_level(level)
    if len(shape) < 2 or level == 0:
        return tuple(shape)
    return (*shape[:-1], num_blocks(shape[-1], level))


def fold(x_RC: Tensor, level: int) -> Tensor:
    """Average each block of 2**level adjacent columns.

    Args:
        x_RC: Shape (..., C), any strides.
        level: Fold level, 0 or more.

    Returns:
        Shape (..., K), in float32 or the dtype of `x_RC`, whichever is more precise; `x_RC` itself
        at level 0 if its dtype stays.

    Raises:
        ValueError: `level` is out of range, or there are no columns.
    """
    check_level(level)
    x_RC = x_RC.to(torch.promote_types(x_RC.dtype, torch.float32))
    if level == 0:
        return x_RC
    means = [_mean_over_last_dim(block) for block in _blocks(x_RC, level)]
    return means[0] if len(means) == 1 else torch.cat(means, dim=-1)


def unfold(s_RK: Tensor, level: int, columns: int) -> Tensor:
    """Repeat each value over the columns of its block.

    Args:
        s_RK: Shape (..., K).
        level: Fold level, 0 or more.
        columns: C, the number of columns of the result.

    Returns:
        Shape (..., C), the dtype of `s_RK`; `s_RK` itself at level 0.

    Raises:
        ValueError: `level` is out of range, or `s_RK` does not have K values in a row.
    """
    if s_RK.shape[-1] != num_blocks(columns, level):
        raise ValueError(
            f"{columns} columns at fold level {level} have {num_blocks(columns, level)} blocks, "
            f"got {s_RK.shape[-1]}"
        )
    if level == 0:
        return s_RK
    return s_RK.repeat_interleave(min(2**level, columns), dim=-1)[..., :columns]


def add_unfolded_(x_RC: Tensor, s_RK: Tensor, level: int, *, alpha: float = 1.0) -> Tensor:
    """Add `alpha * unfold(s)` to `x` in place, without building the unfolded matrix.

    Args:
        x_RC: Shape (..., C), changed.
        s_RK: Shape (..., K).
        level: Fold level, 0 or more.
        alpha: Factor of the unfolded values.

    Returns:
        `x_RC`.
    """
    start = 0
    for block in _blocks(x_RC, level):
        count = block.shape[-2]
        block.add_(s_RK[..., start : start + count].unsqueeze(-1), alpha=alpha)
        start += count
    return x_RC


def check_level(level: int) -> None:
    """Check that a value is a fold level.

    Raises:
        ValueError: `level` is not an integer from 0 to 62.
    """
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= _MAX_LEVEL:
        raise ValueError(
            f"a fold level must be an integer from 0 to {_MAX_LEVEL}, got {level!r}; "
            "20 or more folds each row to one value"
        )


def _blocks(x_RC: Tensor, level: int) -> list[Tensor]:
    """View full blocks as (..., C // width, width), a ragged last one as (..., 1, remainder)."""
    *rows, columns = x_RC.shape
    count = num_blocks(columns, level)
    width = min(2**level, columns)
    if count * width == columns:
        return [x_RC.view(*rows, count, width)]
    edge = (count - 1) * width
    return [x_RC[..., :edge].view(*rows, count - 1, width), x_RC[..., edge:].unsqueeze(-2)]


def _mean_over_last_dim(x: Tensor) -> Tensor:
    width = x.shape[-1]
    if width > _MAX_STRIDED_WIDTH:
        return x.mean(dim=-1)
    return reduce(torch.add, x.unbind(dim=-1)) / width
