"""Choose the fastest implementation of the update of a tensor, and bound its temporary memory."""

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from foam_lightning.optim import cpu_kernel, gpu_kernel
from foam_lightning.optim.functional import StepFactors, foam_step_
from foam_lightning.optim.state import SecondMoment

# A larger matrix is updated some rows at a time, so that all temporaries together stay below 64 MB;
# the embedding of a 7B model would take 0.5 GB for each. A fused update has no temporary of the
# size of the matrix and a cost per call, so its parts are larger.
_PART_ELEMENTS = 2**20
_FUSED_PART_ELEMENTS = 2**23


def update_tensor_(
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
    """Update one tensor and its moments in place: `foam_step_`, or a fused version of it.

    Args:
        param: Weights, shape (..., C), changed.
        grad: Gradient, shape (..., C), unchanged.
        state: The tensors that `state.state_layout` describes, changed.
        factors: The factors of this step, as floats.
        seed: Of stochastic rounding, another one every step; None rounds to nearest.
        fused: Update in one pass over memory where a kernel supports it.
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        eps: Added to the root of the bias-corrected V.
        level: Fold level; for a tensor that must not fold, 0.
        second_moment: See `functional`.
    """
    constants: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": eps, "level": level}
    constants["second_moment"] = second_moment
    if fused and cpu_kernel.is_supported(param, grad, *state.values()):
        # Fake tensors have no data to update, and the kernel has no temporaries to account for.
        if not isinstance(param, FakeTensor):
            cpu_kernel.cpu_kernel_step_(param, grad, factors=factors, **constants | dict(state))
        return
    is_compiled = fused and param.is_cuda and gpu_kernel.is_available()
    step_ = gpu_kernel.gpu_kernel_step_ if is_compiled else foam_step_
    parts = _row_parts(param, _FUSED_PART_ELEMENTS if is_compiled else _PART_ELEMENTS)
    if isinstance(param, FakeTensor) or param.is_meta:
        # Without data only the peak of memory matters, and the first part is the largest.
        parts = parts[:1]
    for number, rows in enumerate(parts):
        step_(
            param[rows],
            grad[rows],
            {key: tensor[rows] for key, tensor in state.items()},
            factors,
            seed=None if seed is None else _part_seed(seed, number),
            **constants,
        )


def _row_parts(param: Tensor, max_elements: int) -> list[slice | EllipsisType]:
    """Split the rows into slices of at most `max_elements` elements each."""
    if param.ndim < 2 or param.numel() <= max_elements:
        return [...]
    rows = max(1, max_elements // (param.numel() // len(param)))
    return [slice(start, start + rows) for start in range(0, len(param), rows)]


def _part_seed(seed: int, part: int) -> int:
    """Hash seed and part to a signed 32-bit integer; `foam_step_` adds up to 2 to it."""
    return (seed * 0x9E3779B1 + part * 0x85EBCA77) % (2**32 - 8) - 2**31
