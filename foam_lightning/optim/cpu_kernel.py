"""The fused update on a CPU in float32: `cpu_kernel.cpp`, compiled once and cached.

torch.compile is too slow here: its code does not vectorise over blocks of 2 to 16 columns, and was
1.2 to 4 times slower than torch's fused AdamW (docs/log.md). `foam_step_` defines the arithmetic;
the kernel is tested against it.
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
# Reassociation vectorises the sums over a block. The rest of -ffast-math stays off: it would change
# how infinities and NaN propagate.
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
# A smaller tensor is finished before a second thread has started.
_MIN_ELEMENTS_FOR_THREADS = 2**16

_log = logging.getLogger(__name__)
_Kernel = Callable[..., None]


class _Factors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            *("one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "step_size"),
            *("residual", "residual_square", "inverse_sqrt_bc2"),
        )
    ]


def is_supported(*tensors: Tensor) -> bool:
    """Return whether the kernel can update these tensors on this machine.

    Args:
        tensors: Parameter, gradient and both moments: all float32, on the CPU, contiguous.
    """
    return (
        all(
            t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()
            for t in tensors
        )
        and _load_kernel() is not None
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
    """Run `foam_step_` without temporaries, equal up to the last bits of float32.

    Args:
        param: Weights, shape (..., C), changed; `is_supported` must hold for all four tensors.
        grad: Gradient, shape (..., C).
        exp_avg: m, shape (..., K), changed.
        exp_avg_sq: v, shape (..., K), changed.
        factors: The factors of this step, as floats.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to the root of the bias-corrected V.
        level: Fold level. Tensors with fewer than two dimensions are treated as one column.
        second_moment: "mean_square" or "square_mean".
    """
    kernel = _load_kernel()
    assert kernel is not None
    columns = param.shape[-1] if param.ndim >= 2 else 1
    # One or all: OpenMP stops and restarts its threads whenever their number changes.
    threads = torch.get_num_threads() if param.numel() >= _MIN_ELEMENTS_FOR_THREADS else 1
    kernel(
        *(param.numel() // columns, columns, min(2**level, columns), threads),
        second_moment == "mean_square",
        *(tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq)),
        ctypes.byref(
            _Factors(
                *(1 - beta1, beta2, 1 - beta2, eps, factors.decay),
                factors.step_size / factors.bias_correction1,
                *(factors.residual, factors.residual_square),
                1 / factors.sqrt_bias_correction2,
            )
        ),
    )
    # As an in-place operator does, so that autograd notices the change.
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


@cache
def _load_kernel() -> _Kernel | None:
    try:
        kernel: _Kernel = ctypes.CDLL(str(_build_library())).foam_step
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning(
            "cannot compile the CPU kernel, so the optimizer uses the slower update; install a C++ "
            "compiler with OpenMP, or name one in CXX (%s)",
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


def _build_library() -> Path:
    """Return the shared library for this machine, compiled unless it is in the cache."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *_FLAGS]
    # -march=native compiles differently on another processor, and a library needs at least the C
    # library that it was linked to, of which machines that share a home may have several.
    machine = (platform.machine(), _cpu_features(), *platform.libc_ver())
    cache_key = (_SOURCE.read_text(encoding="utf-8"), *command, *machine)
    name = hashlib.sha256("\n".join(cache_key).encode()).hexdigest()[:32]
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


def _cpu_features() -> str:
    """Read the instruction sets of the processor, as far as the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
