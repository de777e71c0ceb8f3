"""The update of a tensor compiled by torch.compile, from the same source as the eager one."""

import logging
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from foam_lightning.optim.functional import StepFactors, foam_step_

_log = logging.getLogger(__name__)


def gpu_kernel_step_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    factors: StepFactors,
    *,
    seed: int | None,
    **constants: Any,
) -> None:
    """Do what `foam_step_` does, fused; takes what it takes.

    One program serves every number of rows, every step and every learning rate. It is compiled
    anew only for another number of columns, dtype, level or other constant.

    Args:
        param: The weights, changed.
        grad: Their gradient.
        state: The tensors that `state.layouts` describes, changed.
        factors: What changes from step to step, as numbers.
        seed: See `foam_step_`.
        constants: The other arguments of `foam_step_`.
    """
    for tensor in (param, grad, *state.values()):
        if tensor.ndim >= 2:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    key = (param.ndim, param.shape[-1:] if param.ndim >= 2 else (), param.dtype, grad.dtype)
    try:
        _program(key, tuple(constants.items()))(
            param,
            grad,
            state,
            StepFactors(*(torch.tensor(factor, dtype=torch.float64) for factor in factors)),  # type: ignore[arg-type]
            seed=None if seed is None else torch.tensor(seed, dtype=torch.int32),
            **constants,
        )
    except torch._dynamo.exc.TorchDynamoException as error:
        # Raised before anything has run, so nothing has changed.
        _log.warning(
            "torch.compile failed, so the optimizer takes its slower path: %s",
            " ".join(str(error).split())[:200],
        )
        _failures.append(error)
        foam_step_(param, grad, state, factors, seed=seed, **constants)


# Typed here because torch's stub does not know `isolate_recompiles`.
_compile: Callable[..., Callable[..., None]] = torch.compile


def available() -> bool:
    """Tell whether torch can compile for the GPU, as far as is known.

    That takes Triton, which not every system has, and what Triton takes, such as a C compiler.
    """
    return _has_triton() and not _failures


_has_triton = cache(has_triton)
_failures: list[Exception] = []


@cache
def _program(*key: Hashable) -> Callable[..., None]:
    """Give each key a program of its own: programs in one would count as recompilations of it."""
    return _compile(foam_step_, fullgraph=True, isolate_recompiles=True)
