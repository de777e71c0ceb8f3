"""The update of one tensor by the fastest way its device has, in parts that bound the memory."""

from collections.abc import Mapping
from types import EllipsisType

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from foam_lightning.optim import cpu_kernel as native
from foam_lightning.optim import gpu_kernel as compiled
from foam_lightning.optim.functional import StepFactors, foam_step_
from foam_lightning.optim.state import SecondMoment

# A matrix larger than this is updated some rows at a time, so that all temporaries together stay
# below 64 MB, where the embedding of a 7B model would take 0.5 GB for each. A fused update has no
# temporary of the size of the matrix, and pays for each call: its parts are larger.
_PART_ELEMENTS = 2**20
_FUSED_PART_ELEMENTS = 2**23


def update_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    factors: StepFactors,
    *,
    seed: int | None,
    fused: bool,
    beta1: float,
    beta2: float,
    eps: float,
    level: int,
    second_moment: SecondMoment,
) -> None:
    """Update one tensor and its moments in place.

    Args:
        param: The weights, shape (..., C), changed.
        grad: Their gradient, shape (..., C), left as it is.
        state: The tensors that `state.layouts` describes, changed.
        factors: What changes from step to step, as numbers.
        seed: For rounding at random, another one every step; None rounds to the nearest.
        fused: Take one pass over memory where there is a way.
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        eps: Added to the root of the bias-corrected V.
        level: Fold level; for a tensor that must not fold, 0.
        second_moment: See `step`.
    """
    if fused and native.takes(second_moment, param, grad, *state.values()):
        # Nothing to compute on fake tensors, and no temporary that an account would have to see.
        if not isinstance(param, FakeTensor):
            native.cpu_kernel_step_(
                param,
                grad,
                **state,
                factors=factors,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                level=level,
                second_moment=second_moment,
            )
        return
    compiles = fused and param.is_cuda and compiled.available()
    step_ = compiled.gpu_kernel_step_ if compiles else foam_step_
    limit = _FUSED_PART_ELEMENTS if compiles else _PART_ELEMENTS
    # What makes a matrix orthogonal needs all of it.
    parts = [...] if second_moment == "none" else _row_parts(param, limit)
    if isinstance(param, FakeTensor) or param.is_meta:
        # Only its memory is looked at. Parts come one after the other and leave nothing behind, and
        # none is larger than the first.
        parts = parts[:1]
    for number, rows in enumerate(parts):
        step_(
            param[rows],
            grad[rows],
            {key: tensor[rows] for key, tensor in state.items()},
            factors,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            level=level,
            second_moment=second_moment,
            seed=None if seed is None else _mixed(seed, number),
        )


def _row_parts(param: Tensor, limit: int) -> list[slice | EllipsisType]:
    """List indices of rows, `limit` elements at most, that together are all of them."""
    if param.ndim < 2 or param.numel() <= limit:
        return [...]
    rows = max(1, limit // (param.numel() // len(param)))
    return [slice(start, start + rows) for start in range(0, len(param), rows)]


def _mixed(seed: int, part: int) -> int:
    """Spread both over 32 bits with a sign, a few at the end kept free to count up from it."""
    return (seed * 0x9E3779B1 + part * 0x85EBCA77) % (2**32 - 8) - 2**31
