"""A real GPU: what it costs beside tensors, a wall at the budget, and what a run has taken."""

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
from foam_lightning.units import ByteSize, format_bytes

# A context with all modules loaded stays below; what is above belongs to other processes.
_MOST_CONTEXT_BYTES = 2_000_000_000
_DRIVER = Path("/proc/driver/nvidia/version")
_REFUSAL = re.compile(
    "CUDA (driver )?error: out of memory|Cuda failure .*out of memory|_STATUS_ALLOC_FAILED"
    "|DefaultCPUAllocator:"
)


@dataclass(frozen=True, kw_only=True)
class DeviceCosts:
    """What a GPU takes beside the tensors of a run, in bytes.

    The defaults are for a GPU that was never measured.

    Attributes:
        context: What a CUDA process holds outside torch's counters: its context and the modules
            loaded into it. Reports range from 0.3 to 0.6 GB on an otherwise empty card.
        workspace: What cuBLAS keeps, which torch takes from the caching allocator: one workspace
            for each thread and stream, and forward and backward are two threads. 32 MiB each on
            compute capability 9.0, 8.125 MiB before (parseChosenWorkspaceSize in
            aten/src/ATen/cuda/CublasHandlePool.cpp); the default is the larger one, twice.
    """

    context: int = 600_000_000
    workspace: int = 2 * 32 * 2**20


class Usage(NamedTuple):
    """What a process has taken from a GPU since its peaks were last forgotten.

    Attributes:
        allocated: Peak of the bytes in tensors.
        reserved: Peak of the bytes that torch's caching allocator held for them.
        retries: How often the allocator had to give cached memory back to get more, ever: work
            that slows a run down and a sign that it is at its limit.
    """

    allocated: int
    reserved: int
    retries: int


class Gpu:
    """One CUDA device as this process sees it; everything asked of torch.cuda is asked here.

    Args:
        index: Its number among the visible devices.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index

    @property
    def name(self) -> str:
        """What its maker calls it."""
        return torch.cuda.get_device_name(self.index)

    def memory(self) -> tuple[int, int]:
        """Give free and total bytes of the card; what other processes took is not free."""
        free, total = torch.cuda.mem_get_info(self.index)
        return free, total

    def limit(self, fraction: float) -> None:
        """Refuse memory to this process beyond a share of the card, from 0 to 1."""
        torch.cuda.set_per_process_memory_fraction(fraction, self.index)

    def usage(self) -> Usage:
        """Tell what was taken so far."""
        stats = torch.cuda.memory_stats(self.index)
        return Usage(
            stats.get("allocated_bytes.all.peak", 0),
            stats.get("reserved_bytes.all.peak", 0),
            stats.get("num_alloc_retries", 0),
        )

    def reset_peaks(self) -> None:
        """Count the peaks of `usage` from now on, without what earlier runs have left cached."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.index)

    def measure(self) -> DeviceCosts:
        """Run what a training step runs, small, and see what stays when its tensors are gone.

        The context is all that the card has given away and that torch does not hold. So it counts
        other processes on the card too, and must be measured while there are none; and a kernel
        that this did not load, such as a compiled one, still adds some megabytes when it is.
        """
        before = torch.cuda.memory_allocated(self.index)
        for dtype in (torch.bfloat16, torch.float32):
            work(f"cuda:{self.index}", dtype)
        torch.cuda.synchronize(self.index)
        free, total = self.memory()
        return DeviceCosts(
            context=total - free - torch.cuda.memory_reserved(self.index),
            workspace=torch.cuda.memory_allocated(self.index) - before,
        )


def work(device: str, dtype: torch.dtype) -> None:
    """Run the operators of a LLaMA forward and backward: modules are loaded when first used.

    Args:
        device: Where, such as "cuda:0".
        dtype: Of weights and activations.
    """
    table = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    ids = torch.zeros(64, dtype=torch.int64, device=device)
    heads = (functional.embedding(ids, table) @ table)[None, None]  # (1, 1, 64, 64)
    mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    logits = functional.silu(functional.rms_norm(mixed[0, 0], (64,))) @ table.T
    functional.cross_entropy(logits.float(), ids).backward()


def find_gpu(*, wanted: bool, index: int = 0) -> Gpu | None:
    """Find the GPU that this process trains on; None without one.

    Args:
        wanted: Whether the run is for a GPU at all.
        index: Its number among the visible devices.
    """
    return Gpu(index) if wanted and torch.cuda.is_available() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device, or the host, had no memory left.

    Besides torch's own error these are errors of the CUDA runtime, of cuBLAS, cuDNN and NCCL, which
    need memory of their own, and of the allocator of the CPU.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _REFUSAL.search(str(error)) is not None


@contextmanager
def memory_cap(gpu: Gpu, budget_bytes: int, outside_bytes: int) -> Iterator[None]:
    """Keep this process within a budget, on a larger card too.

    What the caching allocator reserves may not exceed the budget less what it does not see, such as
    the context. An allocation beyond that fails as on a card of that size, after the allocator has
    given back what it had cached.

    Args:
        gpu: The card.
        budget_bytes: For all that the process takes from the card.
        outside_bytes: What the process takes outside the allocator.
    """
    _, total = gpu.memory()
    gpu.limit(min(1.0, max(0, budget_bytes - outside_bytes) / total))
    try:
        yield
    finally:
        with suppress(RuntimeError):  # a context that broke takes no orders
            gpu.limit(1.0)


def missing_memory_warning(gpu: Gpu, budget_bytes: int, outside_bytes: int) -> str | None:
    """Say in one line that a card has less to give than the budget; None if it has enough."""
    free, total = gpu.memory()
    free += outside_bytes  # this process has its context already
    if free >= budget_bytes:
        return None
    return (
        f"the {gpu.name} has {format_bytes(free)} free of {format_bytes(total)}, less than the "
        f"budget of {ByteSize(budget_bytes)}: a plan that needs more runs out of memory; free the "
        "card or "
        "lower --memory-budget"
    )


def load_costs(gpu: Gpu | None) -> DeviceCosts:
    """Look up what was measured on such a GPU, on this machine; else give the defaults."""
    found = _read_costs().get(_identity(gpu)) if gpu else None
    try:
        return DeviceCosts(**found) if found else DeviceCosts()
    except TypeError:  # written by another version
        return DeviceCosts()


def calibrate(gpu: Gpu) -> DeviceCosts:
    """Measure what a GPU costs, unless that is known, and remember it for the next process.

    Kept by name of the GPU, driver, torch and CUDA, in the cache folder. Where other processes
    hold so much of the card that nothing can be said, the defaults are given and nothing is kept.
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
        plan: What it ran by.
        step: Optimizer steps it had done.
        reason: What was refused, in one line.
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
    """Turn the error of a device without memory into one that says what ran.

    Args:
        where: What runs in this context, such as "training".
        plan: What it runs by.
        trainer: Knows the step.

    Raises:
        MemoryShortageError: The device had no memory left.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The text of torch goes on about its allocator.
        reason = first_line(error).split(". GPU ")[0]
        raise MemoryShortageError(where, plan, trainer.global_step, reason) from error
