"""The step of a float32 matrix on the CPU in one pass over memory, compiled from `cpu_kernel.cpp`.

torch.compile cannot do it: the code it makes for the CPU has no instruction that takes blocks of
2 to 16 columns apart inside a vector register, and was 1.2 to 4 times slower than torch's fused
AdamW (docs/log.md). `foam_step_` defines the arithmetic; this is tested against it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from foam_lightning.optim.functional import StepFactors
from foam_lightning.optim.state import SecondMoment
from foam_lightning.storage.atomic import atomic_path
from foam_lightning.storage.paths import cache_home

_SOURCE = Path(__file__).with_suffix(".cpp")
# Reassociation lets the sums over a block run in vector lanes; the rest of -ffast-math, which
# would change what infinities and NaN do, stays off.
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
# A tensor smaller than this is done before a second thread has woken up.
_THREADED_ELEMENTS = 2**16

_log = logging.getLogger(__name__)
_Kernel = Callable[..., None]


class _Factors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            *("gain1", "beta2", "gain2", "eps", "shrink", "size"),
            *("residual_mean", "residual_square", "inverse_root"),
        )
    ]


def takes(second_moment: SecondMoment, *tensors: Tensor) -> bool:
    """Tell whether the kernel can do this update on this machine.

    Args:
        second_moment: The kernel knows "mean_square" and "square_mean".
        tensors: The parameter, its gradient and both moments: all float32, on the CPU, dense.
    """
    return (
        second_moment in ("mean_square", "square_mean")
        and all(
            t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()
            for t in tensors
        )
        and _kernel() is not None
    )


@torch.no_grad()
def cpu_kernel_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    factors: StepFactors,
    beta1: float,
    beta2: float,
    eps: float,
    level: int,
    second_moment: SecondMoment,
) -> None:
    """Do what `foam_step_` does, to the last bits of float32, without a temporary.

    Args:
        param: The weights, shape (..., C), changed; `takes` must hold for all four.
        grad: Their gradient, shape (..., C).
        exp_avg: m, shape (..., K), changed.
        exp_avg_sq: v, shape (..., K), changed.
        factors: What changes from step to step, as numbers.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to the root of the bias-corrected V.
        level: Fold level. Tensors of fewer than two dimensions are taken as a column.
        second_moment: "mean_square" or "square_mean".
    """
    kernel = _kernel()
    assert kernel is not None
    columns = param.shape[-1] if param.ndim >= 2 else 1
    # One or all, because OpenMP stops and starts threads where their number changes.
    threads = torch.get_num_threads() if param.numel() >= _THREADED_ELEMENTS else 1
    kernel(
        *(param.numel() // columns, columns, min(2**level, columns), threads),
        second_moment == "mean_square",
        *(tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq)),
        ctypes.byref(
            _Factors(
                *(1 - beta1, beta2, 1 - beta2, eps, factors.shrink),
                factors.size / factors.bias_correction1,
                *(factors.residual_mean, factors.residual_square),
                1 / factors.root_bias_correction2,
            )
        ),
    )
    # Tells autograd that they changed, as an in-place operator would.
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


@cache
def _kernel() -> _Kernel | None:
    try:
        kernel: _Kernel = ctypes.CDLL(str(_compiled())).foam_step
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning(
            "no kernel for this CPU, so the optimizer takes its slower path; a C++ compiler with "
            "OpenMP, named by CXX, would be needed (%s)",
            " ".join(str(reason).split())[:200],
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes = [  # type: ignore[attr-defined]
        *(number, number, number, ctypes.c_int, ctypes.c_int),
        *(pointer, pointer, pointer, pointer),
        ctypes.POINTER(_Factors),
    ]
    kernel.restype = None  # type: ignore[attr-defined]
    return kernel


def _compiled() -> Path:
    """Give the shared library for this machine, compiled if it is not in the cache."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *_FLAGS]
    # -march=native means another thing on another processor.
    facts = (_SOURCE.read_text(encoding="utf-8"), *command, platform.machine(), _processor())
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
    library = cache_home() / f"step-{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(library) as temporary:
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(temporary)],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            )
    return library


def _processor() -> str:
    """Name what the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
