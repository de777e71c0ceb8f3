"""The fused update on a GPU: one launch of `triton_kernel` for each tensor, without temporaries."""

import logging
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from foam_lightning.optim.fold import num_blocks
from foam_lightning.optim.functional import StepFactors
from foam_lightning.optim.state import CODES_PER_SCALE, SecondMoment, state_layout

# All values of a tile lie in registers. A block, and with int8 a group of codes, lies in one tile.
_TILE = 1024
_MAX_TILE = 2**16
_VALUES_PER_WARP = 256  # 8 for each thread, in bfloat16 the 16 bytes that it reads at once

_log = logging.getLogger(__name__)


def is_supported(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], level: int) -> bool:
    """Return whether the kernel can update this tensor, apart from its device.

    Args:
        param: Weights: float32 or bfloat16, contiguous as all the others.
        grad: Gradient: float32 or bfloat16.
        state: The tensors that `state.state_layout` describes, none of them float64.
        level: Fold level. A block of more than 65,536 columns is not supported.
    """
    floats = (torch.float32, torch.bfloat16)
    columns = param.shape[-1] if param.ndim >= 2 else param.numel()
    width, blocks = _tile_shape(columns, level, has_codes="exp_avg_scale" in state)
    return (
        param.dtype in floats
        and grad.dtype in floats
        and not any(tensor.dtype == torch.float64 for tensor in state.values())
        and all(tensor.is_contiguous() for tensor in (param, grad, *state.values()))
        and width * blocks <= _MAX_TILE
    )


def is_expected() -> bool:
    """Return whether a run on a GPU will use the kernel, as far as is known without starting CUDA.

    It needs Triton, which every Linux build of torch for CUDA brings. Without a GPU here the plan
    is for one elsewhere, which is taken to have it.
    """
    return not torch.cuda.is_available() or find_spec("triton") is not None


@cache
def is_available() -> bool:
    """Return whether the kernel runs on this machine's GPU, found out by an update of one element.

    Triton also needs a C compiler. If something is missing, warns once.
    """
    try:
        zero = torch.zeros(1, device="cuda")
        state = {key: zero.clone() for key in state_layout((1,), 0, torch.float32)}
        factors = StepFactors.at_step(1, beta1=0.9, beta2=0.999)
        gpu_kernel_step_(
            zero, zero.clone(), state, factors, beta1=0.9, beta2=0.999, eps=1e-8, level=0
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers and drivers raise
        _log.warning(
            "Triton cannot compile for this GPU, so the optimizer uses the slower update, with up "
            "to 64 MB of temporaries; install triton and a C compiler (%s)",
            " ".join(str(error).split())[:200],
        )
        return False
    return True


@torch.no_grad()
def gpu_kernel_step_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    factors: StepFactors,
    *,
    seed: int | None = None,
    beta1: float,
    beta2: float,
    eps: float,
    level: int,
    second_moment: SecondMoment = "mean_square",
    clip_factor: Tensor | None = None,
) -> None:
    """Run `foam_step_` in one launch without temporaries, equal up to the last bits of float32.

    A program is compiled for each combination of block width, dtypes and divisibility of the number
    of columns by 16; another step, learning rate or number of rows compiles none.

    Args:
        param: Weights, shape (..., C), changed; `is_supported` must hold.
        grad: Gradient, shape (..., C).
        state: The tensors that `state.state_layout` describes, changed.
        factors: The factors of this step.
        seed: Of stochastic rounding, see `foam_step_`; None rounds to nearest.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to the root of the bias-corrected V.
        level: Fold level; for a tensor that must not fold, 0.
        second_moment: What v averages, see `functional`.
        clip_factor: If given, a tensor of one element by which the gradient is multiplied.
    """
    # Not at the top, because not every system has Triton.
    from foam_lightning.optim.triton_kernel import foam_kernel

    columns = param.shape[-1] if param.ndim >= 2 else param.numel()
    has_codes = "exp_avg_scale" in state
    width, tile_blocks = _tile_shape(columns, level, has_codes=has_codes)
    if columns % width == 0 and not has_codes:
        # No block crosses the end of a row, so that all rows together are one.
        columns = param.numel()
        tile_blocks = max(1, _TILE // width)
    blocks = num_blocks(columns, min(level, width.bit_length() - 1))
    tiles = -(-blocks // tile_blocks)
    with torch.cuda.device_of(param):
        foam_kernel[(param.numel() // columns * tiles,)](
            param,
            grad,
            state["exp_avg"],
            state.get("exp_avg_scale", param),
            state["exp_avg_sq"],
            state.get("exp_avg_sq_scale", param),
            param if clip_factor is None else clip_factor,
            columns,
            blocks,
            tiles,
            0 if seed is None else seed,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            factors.decay,
            factors.step_size / factors.bias_correction1,
            factors.residual,
            factors.residual_square,
            1 / factors.sqrt_bias_correction2,
            WIDTH=width,
            BLOCKS=tile_blocks,
            RAGGED=columns % width != 0,
            CLIP=clip_factor is not None,
            MEAN_SQUARE=second_moment == "mean_square",
            STOCHASTIC=seed is not None,
            num_warps=min(max(width * tile_blocks // _VALUES_PER_WARP, 1), 32),
        )
    # As an in-place operator does, so that autograd notices the change.
    torch.autograd.graph.increment_version((param, *state.values()))


def _tile_shape(columns: int, level: int, *, has_codes: bool) -> tuple[int, int]:
    """Compute the width of a block and the number of blocks in a tile, both powers of two."""
    width = _next_power_of_two(min(2**level, columns))
    blocks_of_row = _next_power_of_two(num_blocks(columns, level))
    blocks = max(1, min(_TILE // width, blocks_of_row))
    return width, max(blocks, min(CODES_PER_SCALE, blocks_of_row)) if has_codes else blocks


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
