"""The fused update on a GPU: `foam_step_` compiled by torch.compile.

Uses private parts of torch, checked on torch 2.13: `torch._dynamo.maybe_mark_dynamic`,
`torch._dynamo.exc.TorchDynamoException`, `torch.utils._triton.has_triton` and the option
`isolate_recompiles`, which torch's stubs lack. tests/optim/test_kernels.py fails when one changes.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from foam_lightning.optim.functional import StepFactors, foam_step_

_log = logging.getLogger(__name__)
_failures: list[Exception] = []
_has_triton = cache(has_triton)
# Typed here because torch's stub does not know `isolate_recompiles`.
_compile: Callable[..., Callable[..., None]] = torch.compile


def gpu_kernel_step_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    factors: StepFactors,
    *,
    seed: int | None,
    **constants: Any,
) -> None:
    """Run `foam_step_` compiled; if compilation fails, run it as it is and warn once.

    One compiled program serves every number of rows, every step and every learning rate. Another
    number of columns, dtype, level or other constant compiles another one.

    Args:
        param: Weights, changed.
        grad: Gradient.
        state: The tensors that `state.state_layout` describes, changed.
        factors: The factors of this step, as floats.
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
            "torch.compile failed; the optimizer uses the slower update: %s",
            " ".join(str(error).split())[:200],
        )
        _failures.append(error)
        foam_step_(param, grad, state, factors, seed=seed, **constants)


def is_available() -> bool:
    """Return whether torch can compile for the GPU, as far as is known.

    It needs Triton, which not every system has, and Triton needs a C compiler: a compilation that
    failed turns this to False.
    """
    return _has_triton() and not _failures


@cache
def _program(*key: Hashable) -> Callable[..., None]:
    """Compile one program per key: a shared one would hit torch's limit of recompilations."""
    return _compile(foam_step_, fullgraph=True, isolate_recompiles=True)
