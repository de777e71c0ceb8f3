"""Run optimizer steps and measure time, temporaries and bytes of state."""

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.optim import Optimizer

from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.optim.plain_state import measure_state_bytes, state_tensors
from tests.benchmarks.contenders import Row, Weights

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


class Bandwidth(NamedTuple):
    """Bytes per second, read and written, of a copy and of a multiplication in place.

    On a CPU the copy is slower, because a cache line is read before it is overwritten.
    """

    copy: float
    in_place: float


@dataclass
class Stepped:
    """Measurements of one row.

    Attributes:
        name: Of the row.
        optimizers: The optimizers.
        first_seconds: Time to create the optimizers and run the first step.
        temporary_bytes: Peak of the tensors created in a step; None if it cannot be measured.
        state_bytes: Bytes of the state after the first steps.
        seconds: Time of each timed step.
        failure: Why there are no measurements.
    """

    name: str
    optimizers: list[Optimizer] = field(default_factory=list)
    first_seconds: float = 0.0
    temporary_bytes: int | None = None
    state_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def fail(self, error: Exception) -> None:
        line = (str(error).strip() or "no message").splitlines()[0].replace("|", "/")
        self.failure = f"failed: {type(error).__name__}: {line}"[:200]
        self.optimizers = []


def step_all(
    rows: Sequence[Row],
    weights: Weights,
    *,
    rounds: int,
    copy_bytes: int,
    begin_seconds: float = math.inf,
) -> Iterator[tuple[list[Stepped], Bandwidth | None]]:
    """Measure the rows, one timed step of each in turn.

    Args:
        rows: The rows to measure.
        weights: The weights that they update.
        rounds: Timed steps of each row.
        copy_bytes: Size of the tensor on which bandwidth is measured, once a round.
        begin_seconds: Rows that would begin later than this are skipped.

    Yields:
        The measurements by row so far, and the bandwidth; None before the first timed round. Once
        for each row's first steps, and once for each round.
    """
    begin = time.monotonic()
    start_compiler(rows, weights.device)
    found: list[Stepped] = []
    for row in rows:
        if time.monotonic() - begin > begin_seconds:
            found.append(Stepped(row.name, failure="skipped: out of time"))
        else:
            found.append(first_steps(row, weights))
        say(f"{row.name}: {found[-1].failure or f'first step {found[-1].first_seconds:.2f} s'}")
        yield found, None
    source = torch.ones(copy_bytes // 4, device=weights.device)
    target = torch.zeros_like(source)
    copies, products = [], []
    for number in range(rounds):
        copies.append(seconds_of(lambda: target.copy_(source), weights.device))
        products.append(seconds_of(lambda: target.mul_(0.5), weights.device))
        for stepped in found:
            if stepped.failure is None:
                try:
                    stepped.seconds.append(seconds_of(stepping(stepped), weights.device))
                except Exception as error:  # as in `first_steps`
                    stepped.fail(error)
        say(f"round {number + 1} of {rounds}, {time.monotonic() - begin:.0f} s")
        yield (
            found,
            Bandwidth(
                copy=2 * copy_bytes / statistics.median(copies),
                in_place=2 * copy_bytes / statistics.median(products),
            ),
        )


def first_steps(row: Row, weights: Weights) -> Stepped:
    """Create the optimizers of a row and step three times: cold, measured, and warm."""
    stepped = Stepped(row.name)
    untouched = [grad._version for grad in weights.gradients]

    def begin() -> None:
        stepped.optimizers = row.make(weights)
        stepping(stepped)()

    try:
        if row.package is not None:
            import_module(row.package)
        stepped.first_seconds = seconds_of(begin, weights.device)
        if weights.device == "cuda":
            stepped.temporary_bytes = _temporaries_on_cuda(stepped)
        elif weights.device not in row.compiled_on:
            stepped.temporary_bytes = _temporaries_on_cpu(stepped, weights)
        stepping(stepped)()
        stepped.state_bytes = sum(map(measure_state_bytes, stepped.optimizers))
        if [grad._version for grad in weights.gradients] != untouched:
            raise RuntimeError("it changes the gradients, which all rows share")
    except Exception as error:  # reported in the row, whatever it is
        stepped.fail(error)
    return stepped


def stepping(stepped: Stepped) -> Callable[[], None]:
    """Return a function that runs one step of a row."""

    def step() -> None:
        for optimizer in stepped.optimizers:
            optimizer.step()

    return step


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Time some work, on a GPU from idle to idle."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def start_compiler(rows: Sequence[Row], device: str) -> None:
    """Compile something first, so that no row pays for the first compilation of a process."""
    if any(device in row.compiled_on for row in rows):
        torch.compile(torch.square)(torch.ones(8, device=device))


@contextmanager
def cold_caches() -> Iterator[None]:
    """Use empty compilation caches."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, {name: f"{folder}/{name.lower()}" for name in _CACHES}),
    ):
        yield


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _temporaries_on_cpu(stepped: Stepped, weights: Weights) -> int:
    tracker = StorageTracker()
    tracker.claim([*weights.named.values(), *weights.gradients], "weights")
    tracker.claim(chain.from_iterable(map(state_tensors, stepped.optimizers)), "optimizer_state")
    tracker.term = "workspace"
    with tracker:
        stepping(stepped)()
    tracker.claim(chain.from_iterable(map(state_tensors, stepped.optimizers)), "optimizer_state")
    return tracker.peak().terms["workspace"]


def _temporaries_on_cuda(stepped: Stepped) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stepping(stepped)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
