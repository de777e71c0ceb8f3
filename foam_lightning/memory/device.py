"""A real GPU: its memory beyond the tensors, a cap on memory, and what a run has used."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch.nn import functional

from foam_lightning.errors import FoamError, first_line
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.paths import cache_home
from foam_lightning.units import format_bytes, format_bytes_apart

# A context with all modules loaded is smaller; anything above belongs to other processes.
_MOST_CONTEXT_BYTES = 2_000_000_000
_DRIVER = Path("/proc/driver/nvidia/version")
_OUT_OF_MEMORY = re.compile(
    "CUDA (driver )?error: out of memory|Cuda failure .*out of memory|_STATUS_ALLOC_FAILED"
    "|DefaultCPUAllocator:"
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
        """Run the operators of a small training step and measure what stays allocated.

        The context is all used memory of the card that torch has not reserved. That includes other
        processes, so there should be none. A kernel that is loaded later, such as a compiled one,
        still adds some megabytes.
        """
        before = torch.cuda.memory_allocated(self.index)
        for dtype in (torch.bfloat16, torch.float32):
            run_llama_operators(f"cuda:{self.index}", dtype)
        torch.cuda.synchronize(self.index)
        free, total = self.memory()
        return DeviceCosts(
            context=total - free - torch.cuda.memory_reserved(self.index),
            workspace=torch.cuda.memory_allocated(self.index) - before,
        )


def run_llama_operators(device: str, dtype: torch.dtype) -> None:
    """Run the operators of a LLaMA forward and backward, which loads their CUDA modules.

    Args:
        device: The device, such as "cuda:0".
        dtype: The dtype of weights and activations.
    """
    table = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    ids = torch.zeros(64, dtype=torch.int64, device=device)
    heads = (functional.embedding(ids, table) @ table)[None, None]  # (1, 1, 64, 64)
    mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    logits = functional.silu(functional.rms_norm(mixed[0, 0], (64,))) @ table.T
    functional.cross_entropy(logits.float(), ids).backward()


def find_gpu(*, wanted: bool, index: int = 0) -> Gpu | None:
    """Return the GPU that this process trains on; None without one.

    Args:
        wanted: Whether the run may use a GPU.
        index: Its number among the visible devices.
    """
    return Gpu(index) if wanted and torch.cuda.is_available() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the host, ran out of memory.

    Besides torch's own error these are errors of the CUDA runtime, of cuBLAS, cuDNN and NCCL, which
    allocate memory of their own, and of torch's CPU allocator.
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
    _, total = gpu.memory()
    gpu.limit(min(1.0, max(0, budget_bytes - outside_bytes) / total))
    try:
        yield
    finally:
        with suppress(RuntimeError):  # after an error that broke the CUDA context
            gpu.limit(1.0)


def missing_memory_warning(gpu: Gpu, budget_bytes: int, outside_bytes: int) -> str | None:
    """Write one line if less memory of a card is free than the budget; None if enough is."""
    free, total = gpu.memory()
    free += outside_bytes  # this process has its context already
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

    The result is stored in the cache folder by name of the GPU, driver, torch and CUDA. Where other
    processes use too much of the card to measure, the defaults are returned and nothing is stored.
    """
    kept = _read_costs()
    if _identity(gpu) in kept:
        return load_costs(gpu)
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


def _identity(gpu: Gpu) -> str:
    text = _DRIVER.read_text(encoding="utf-8") if _DRIVER.exists() else ""
    driver = re.search(r"\d+\.\d+(\.\d+)?", text)
    return ", ".join(
        [
            gpu.name,
            f"driver {driver[0] if driver else 'unknown'}",
            f"torch {torch.__version__}",
            f"CUDA {torch.version.cuda}",
        ]
    )


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
