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
# the embedding of a 7B model would take 0.5 GB for each.
_PART_ELEMENTS = 2**20


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
    clip_factor: Tensor | None = None,
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
        clip_factor: If given, a tensor of one element by which the gradient is multiplied.
    """
    constants: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": eps, "level": level}
    constants["second_moment"] = second_moment
    # Fake tensors and those on the meta device have no data to update; their update only shows its
    # peak of memory, and no kernel has temporaries.
    has_data = not isinstance(param, FakeTensor) and not param.is_meta
    seed = None if seed is None else _hash_seed(seed)
    if fused and _runs_on_gpu(param, grad, state, level):
        if has_data:
            gpu_kernel.gpu_kernel_step_(
                param, grad, state, factors, seed=seed, clip_factor=clip_factor, **constants
            )
        return
    if clip_factor is not None:
        grad = grad * clip_factor.to(grad.dtype)
    if fused and cpu_kernel.is_supported(param, grad, *state.values()):
        if has_data:
            cpu_kernel.cpu_kernel_step_(param, grad, factors=factors, **constants | dict(state))
        return
    parts = _row_parts(param)
    for first_row, rows in parts if has_data else parts[:1]:  # the first part is the largest
        foam_step_(
            param[rows],
            grad[rows],
            {key: tensor[rows] for key, tensor in state.items()},
            factors,
            seed=seed,
            first_row=first_row,
            **constants,
        )


def _runs_on_gpu(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], level: int) -> bool:
    return (
        all(tensor.is_cuda or tensor.is_meta for tensor in (param, grad, *state.values()))
        and gpu_kernel.is_supported(param, grad, state, level)
        and gpu_kernel.is_available()
    )


def _row_parts(param: Tensor) -> list[tuple[int, slice | EllipsisType]]:
    """Split the rows into parts of at most _PART_ELEMENTS elements, each with its first row."""
    if param.ndim < 2 or param.numel() <= _PART_ELEMENTS:
        return [(0, ...)]
    rows = max(1, _PART_ELEMENTS // (param.numel() // len(param)))
    return [(start, slice(start, start + rows)) for start in range(0, len(param), rows)]


def _hash_seed(seed: int) -> int:
    """Hash a seed to a signed 32-bit integer."""
    return seed * 0x9E3779B1 % (2**32 - 8) - 2**31
