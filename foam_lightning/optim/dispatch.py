"""Choose the fastest implementation of the update of a tensor, and bound its temporary memory."""

from collections.abc import Mapping
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from foam_lightning.model.int8_weights import Int8Weight, dequantize, quantize
from foam_lightning.optim import cpu_kernel, gpu_kernel, rounding
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
        param: Weights, shape (..., C), changed. Those in int8 are rounded to codes by `seed`.
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
    constants |= {"second_moment": second_moment, "clip_factor": clip_factor, "fused": fused}
    seed = None if seed is None else _hash_seed(seed)
    if isinstance(param, Int8Weight):
        _update_int8_(param, grad, state, factors, seed=seed, **constants)
    else:
        _update_(param, grad, state, factors, seed=seed, **constants)


def _update_int8_(
    param: Int8Weight,
    grad: Tensor,
    state: Mapping[str, Tensor],
    factors: StepFactors,
    *,
    seed: int | None,
    **constants: Any,
) -> None:
    """Dequantize some rows at a time, update them in float32, and quantize them again."""
    parts = _row_parts(param)
    for first_row, rows in parts if _has_data(param.codes) else parts[:1]:
        codes, scales = param.codes[rows], param.scales[rows]
        weights = dequantize(codes, scales, torch.float32)
        of_rows = {key: tensor[rows] for key, tensor in state.items()}
        # The bits of the moments are those of the whole matrix, and the weights get others.
        seed_of_moments, round_codes = None, torch.round
        if seed is not None:
            seed_of_moments = rounding.seed_at(seed, first_row * state["exp_avg"].shape[-1])
            seed_of_weights = rounding.seed_at(seed + 2, first_row * param.shape[-1])
            round_codes = partial(rounding.to_integer, seed=seed_of_weights)
        _update_(weights, grad[rows], of_rows, factors, seed=seed_of_moments, **constants)
        new_codes, new_scales = quantize(weights, scales, round_codes)
        codes.copy_(new_codes)
        scales.copy_(new_scales)


def _update_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    factors: StepFactors,
    *,
    seed: int | None,
    fused: bool,
    clip_factor: Tensor | None,
    **constants: Any,
) -> None:
    """Update a tensor that is stored as it is; `seed` is hashed."""
    has_data = _has_data(param)
    if fused and _runs_on_gpu(param, grad, state, constants["level"]):
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


def _has_data(tensor: Tensor) -> bool:
    """Return whether there is data to update: fake tensors and those on the meta device have none.

    Their update only shows its peak of memory, and no kernel has temporaries.
    """
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def _runs_on_gpu(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], level: int) -> bool:
    return (
        all(tensor.is_cuda or tensor.is_meta for tensor in (param, grad, *state.values()))
        and gpu_kernel.is_supported(param, grad, state, level)
        and (gpu_kernel.is_available() if _has_data(param) else gpu_kernel.is_expected())
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
