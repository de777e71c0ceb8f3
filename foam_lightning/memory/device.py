"""A real GPU: its memory beyond the tensors, a cap on memory, and what a run has used."""

import gc
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from lightning.pytorch import Trainer

from foam_lightning.errors import FoamError, first_line
from foam_lightning.memory.trace import autocast_for, weight_dtype
from foam_lightning.model.llama import create_config, create_initialized
from foam_lightning.model.loss import token_loss
from foam_lightning.optim.foam import FOAM
from foam_lightning.plan import FoldPlan
from foam_lightning.settings import Precision
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.paths import cache_home
from foam_lightning.units import format_bytes, format_bytes_apart

# A context with all modules loaded is smaller; anything above belongs to other processes.
_MOST_CONTEXT_BYTES = 2_000_000_000
_DRIVER = Path("/proc/driver/nvidia/version")
_CUBLAS_SIZES = "CUBLAS_WORKSPACE_CONFIG"
# What changes how much the libraries take: also whether all modules are loaded at the start.
_VARIABLES = (_CUBLAS_SIZES, "CUDA_MODULE_LOADING")
# The driver gives back the memory of a process some time after it has ended.
_POLL_SECONDS, _MAX_POLLS = 0.1, 50
# torch, Triton and NCCL quote the runtime or the driver ("out of memory"), and NCCL also names the
# call that failed. cuBLAS, cuDNN, cuSOLVER and cuSPARSE have a status each; one whose handle does
# not get its memory says that it is not initialized.
_OUT_OF_MEMORY = re.compile(
    r"\b(CUDA|Cuda|HIP|Hip)\b.*\bout of memory|ERROR_OUT_OF_MEMORY|_ALLOC(ATION)?_FAILED"
    r"|_STATUS_NOT_INITIALIZED|_STATUS_INTERNAL_ERROR.*Create\(|_STATUS_INSUFFICIENT_RESOURCES"
    r"|hipErrorOutOfMemory|miopenStatusAllocFailed|rocblas_status_memory_error"
    r"|Failed to (CUDA|HIP) (host )?[cm]?alloc|DefaultCPUAllocator:"
)


@dataclass(frozen=True, kw_only=True)
class DeviceCosts:
    """What a GPU needs beyond the tensors of a run, in bytes.

    The defaults are for a GPU that was never measured.

    Attributes:
        context: Memory of a CUDA process outside torch's counters: its context and the modules
            loaded into it. Reports range from 0.3 to 0.6 GB on an otherwise empty card.
        workspace: Workspaces of cuBLAS in torch's caching allocator: one for each thread and
            stream, and forward and backward are two threads. 32 MiB each on compute capability
            9.0, 8.125 MiB before (parseChosenWorkspaceSize in
            aten/src/ATen/cuda/CublasHandlePool.cpp); the default is the larger one, twice.
    """

    context: int = 600_000_000
    workspace: int = 2 * 32 * 2**20


class GpuUsage(NamedTuple):
    """What a process has used of a GPU since its peaks were last reset.

    Attributes:
        allocated: Peak of the bytes in tensors.
        reserved: Peak of the bytes that torch's caching allocator reserved for them.
        retries: How often the allocator had to free cached memory to get more, since the process
            started: it slows a run down and shows that it is at its limit.
    """

    allocated: int
    reserved: int
    retries: int


class Gpu:
    """One CUDA device as this process sees it; all calls of torch.cuda about memory are here.

    Args:
        index: Its number among the visible devices.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index

    @property
    def name(self) -> str:
        """The product name."""
        return torch.cuda.get_device_name(self.index)

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes of the card; what other processes use is not free."""
        free, total = torch.cuda.mem_get_info(self.index)
        return free, total

    def outside(self) -> int:
        """Return the used bytes of the card that torch's allocator of this process does not hold.

        Without other processes on the card that is the context of this one, which grows whenever a
        kernel runs for the first time.
        """
        free, total = self.memory()
        return total - free - torch.cuda.memory_reserved(self.index)

    def limit(self, fraction: float) -> None:
        """Limit this process to a share of the card's memory, from 0 to 1."""
        torch.cuda.set_per_process_memory_fraction(fraction, self.index)

    def usage(self) -> GpuUsage:
        """Return the peaks so far."""
        stats = torch.cuda.memory_stats(self.index)
        return GpuUsage(
            stats.get("allocated_bytes.all.peak", 0),
            stats.get("reserved_bytes.all.peak", 0),
            stats.get("num_alloc_retries", 0),
        )

    def reset_peaks(self) -> None:
        """Reset the peaks of `usage`, and free what earlier runs left in the cache."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.index)

    def measure(self) -> DeviceCosts:
        """Train a small model for two steps and measure what stays allocated.

        The context is all used memory of the card that torch has not reserved. That includes other
        processes, so there should be none. A kernel that only large tensors need still adds some
        megabytes; `current_context` finds them.
        """
        before = torch.cuda.memory_allocated(self.index)
        for precision in get_args(Precision):
            train_small_model(f"cuda:{self.index}", precision)
        gc.collect()
        torch.cuda.synchronize(self.index)
        return DeviceCosts(
            context=self.outside(), workspace=torch.cuda.memory_allocated(self.index) - before
        )


def train_small_model(device: str, precision: Precision) -> None:
    """Train a LLaMA of two layers for two steps, which loads the kernels that training uses.

    Args:
        device: The device, such as "cuda:0".
        precision: Lightning's name of the precision.
    """
    config = create_config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=None,
        vocab_size=256,
        max_position_embeddings=64,
    )
    with torch.device(device):
        model = create_initialized(config, seed=0)
        torch.nn.Module.to(model, weight_dtype(precision))
        ids = torch.zeros(2, 64, dtype=torch.int64)
    optimizer = FOAM(model.parameters(), level=2)
    for _ in range(2):
        with autocast_for(precision, ids.device.type):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            total, _ = token_loss(hidden, model.lm_head, ids)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()


def find_gpu(*, wanted: bool, index: int = 0) -> Gpu | None:
    """Return the GPU that this process trains on; None without one.

    Args:
        wanted: Whether the run may use a GPU.
        index: Its number among the visible devices.
    """
    return Gpu(index) if wanted and torch.cuda.is_available() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the host, ran out of memory.

    Besides torch's own error these are errors of the CUDA or HIP runtime and driver, of libraries
    that allocate memory of their own (cuBLAS, cuDNN, cuSOLVER, cuSPARSE, NCCL, Triton), and of
    torch's CPU allocator.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def memory_cap(gpu: Gpu, budget_bytes: int, outside_bytes: int) -> Iterator[None]:
    """Cap the memory of this process at a budget, on a larger card too.

    The caching allocator may reserve the budget less what it does not count, such as the context.
    An allocation beyond that fails as on a card of that size, after the allocator has freed its
    cache.

    Args:
        gpu: The card.
        budget_bytes: Limit for all that the process uses of the card.
        outside_bytes: What the process uses outside the allocator.
    """
    limit_memory(gpu, budget_bytes, outside_bytes)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # after an error that broke the CUDA context
            gpu.limit(1.0)


def limit_memory(gpu: Gpu, budget_bytes: int, outside_bytes: int) -> None:
    """Limit the allocator to the budget less what the process uses outside of it."""
    _, total = gpu.memory()
    gpu.limit(min(1.0, max(0, budget_bytes - outside_bytes) / total))


def wait_for_memory(gpu: Gpu, wanted_bytes: int) -> int:
    """Wait while memory of a process that has just ended is given back, for 5 seconds at most.

    A run that starts afresh after memory ran out would otherwise count its own old memory as that
    of others.

    Args:
        gpu: The card.
        wanted_bytes: What should be free; more than the card has is not waited for.

    Returns:
        The bytes that are free.
    """
    (free, total), before = gpu.memory(), -1
    for _ in range(_MAX_POLLS):
        if wanted_bytes > total or (free >= wanted_bytes and free == before):
            break
        time.sleep(_POLL_SECONDS)
        before, (free, _) = free, gpu.memory()
    return free


def missing_memory_warning(gpu: Gpu, budget_bytes: int, outside_bytes: int) -> str | None:
    """Write one line if less memory of a card is free than the budget; None if enough is."""
    _, total = gpu.memory()
    # This process has its context already.
    free = wait_for_memory(gpu, budget_bytes - outside_bytes) + outside_bytes
    if free >= budget_bytes:
        return None
    available, budget = format_bytes_apart(free, budget_bytes)
    return (
        f"the {gpu.name} has {available} free of {format_bytes(total)}, less than the budget of "
        f"{budget}: a plan that needs more runs out of memory; end other processes on the card or "
        "lower --memory-budget"
    )


def load_costs(gpu: Gpu | None) -> DeviceCosts:
    """Return what was measured on this kind of GPU on this machine, or the defaults."""
    found = _read_costs().get(_identity(gpu)) if gpu else None
    try:
        return DeviceCosts(**found) if found else DeviceCosts()
    except TypeError:  # written by another version
        return DeviceCosts()


def calibrate(gpu: Gpu) -> DeviceCosts:
    """Measure what a GPU needs beyond tensors, or load what was measured before.

    The result is stored in the cache folder by name of the GPU, driver, torch, CUDA, and the
    variables that change how much its libraries take. Where other processes use too much of the
    card to measure, the defaults are returned and nothing is stored.
    """
    kept = _read_costs()
    if _identity(gpu) in kept:
        return load_costs(gpu)
    _, total = gpu.memory()
    wait_for_memory(gpu, total - _MOST_CONTEXT_BYTES)
    try:
        costs = gpu.measure()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return DeviceCosts()
    if not 0 < costs.context <= _MOST_CONTEXT_BYTES:
        return DeviceCosts()
    path = _costs_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**kept, _identity(gpu): asdict(costs)})
    return costs


def current_context(gpu: Gpu) -> int:
    """Return the bytes of the context as it is now, at least those of the calibration.

    Where other processes use more of the card than a context can have, it is the latter.
    """
    context, now = load_costs(gpu).context, gpu.outside()
    return max(context, now) if now <= _MOST_CONTEXT_BYTES else context


def _identity(gpu: Gpu) -> str:
    text = _DRIVER.read_text(encoding="utf-8") if _DRIVER.exists() else ""
    driver = re.search(r"\d+\.\d+(\.\d+)?", text)
    parts = [
        gpu.name,
        f"driver {driver[0] if driver else 'unknown'}",
        f"torch {torch.__version__}",
        f"CUDA {torch.version.cuda}",
    ]
    parts += [f"{name} {os.environ[name]}" for name in _VARIABLES if os.environ.get(name)]
    return ", ".join(parts)


def _costs_file() -> Path:
    return cache_home() / "device_costs.json"


def _read_costs() -> dict[str, dict[str, int]]:
    try:
        content = json.loads(_costs_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class MemoryShortageError(FoamError):
    """A run needed more memory than there was.

    Args:
        where: What ran, such as "training".
        plan: The plan of the run.
        step: Optimizer steps done before.
        reason: The allocation that failed, in one line.
    """

    exit_code = 3

    def __init__(self, where: str, plan: FoldPlan, step: int, reason: str) -> None:
        self.where = where
        self.plan = plan
        self.step = step
        self.reason = reason
        super().__init__(f"memory ran out in {where}, after step {step}: {reason}")


@contextmanager
def memory_shortage_context(where: str, plan: FoldPlan, trainer: Trainer) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the run.

    Args:
        where: What runs in this context, such as "training".
        plan: The plan of the run.
        trainer: The trainer, for the current step.

    Raises:
        MemoryShortageError: The device ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # torch's text continues with details of its allocator.
        reason = first_line(error).split(". GPU ")[0]
        raise MemoryShortageError(where, plan, trainer.global_step, reason) from error
