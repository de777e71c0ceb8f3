"""Compare predicted and measured peaks, over training settings in which every pair occurs.

    python -m tests.benchmarks.memory_truth [--output FILE]
    python -m tests.benchmarks.memory_truth --device cuda [--minutes 9] [--output FILE]

A run is like a rehearsal: two optimizer steps and an evaluation by Lightning's trainer. On a CPU
every storage of the run is tracked; on a GPU, torch counts what is allocated, and the card what the
process uses in all. There every run has a process of its own.
"""

import argparse
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foam_lightning.memory.allocator import set_expandable_segments
from foam_lightning.memory.device import Gpu, calibrate, wait_for_memory
from foam_lightning.units import format_bytes
from tests.benchmarks.combinations import Combination, choose
from tests.benchmarks.fresh_process import in_fresh_process
from tests.benchmarks.heading import commit_and_date, machine, packages, publish
from tests.benchmarks.memory_runs import (
    MIXED_LEVELS,
    MOST_TOKENS,
    Peak,
    measure_on_cpu,
    measure_on_gpu,
    predict,
    quiet,
)
from tuner.report.markdown import markdown_table

SMALL = ("default", "llama_20m")
MODELS = {"cpu": SMALL, "cuda": (*SMALL, "llama_60m", "llama_130m", "llama_350m", "llama_1b")}
MICRO_BATCHES = {"cpu": (1, 2, 4), "cuda": (1, 4, 16)}
COUNTS = {"cpu": 48, "cuda": 60}
UNDER = 0.995
NO_TIME = "no time left"
NOT_PREDICTED = "not predicted"
ONLY_TENSORS = "tensors only"  # of a prediction without an account


@dataclass(frozen=True)
class Row:
    """One combination: its predicted peak, and the measured one.

    Of either there may be a reason instead why there is none.
    """

    combination: Combination
    predicted: Peak | str
    measured: Peak | str

    @property
    def ratio(self) -> float | None:
        """Predicted over measured, in tensors."""
        if isinstance(self.predicted, str) or isinstance(self.measured, str):
            return None
        return self.predicted.tensors / self.measured.tensors

    @property
    def ratio_on_card(self) -> float | None:
        """Predicted over measured, on the card in all."""
        if isinstance(self.predicted, str) or isinstance(self.measured, str):
            return None
        predicted, measured = self.predicted.device, self.measured.device
        return predicted / measured if predicted and measured else None


# ---- the grid


def run_on_cpu(grid: Sequence[Combination]) -> Iterator[Row]:
    for one in grid:
        yield Row(one, predict(one, "cpu"), measure_on_cpu(one))


def run_on_gpu(grid: Sequence[Combination], seconds: float) -> Iterator[Row]:
    """Do as many runs of the grid as there is time for, each in a process of its own.

    Predictions take half of the time at most. No run begins before they are done, because what they
    take of the card would be counted as the run's.

    Yields:
        A row for every combination, in order.
    """
    end = time.monotonic() + seconds
    # Asking by NVML leaves a process whose children will use the GPU as it was.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    set_expandable_segments()
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.benchmarks.memory_runs", "transformers.models.llama.modeling_llama"]
    )
    predictions = _predict_all(context, grid, end - seconds / 2)
    card, free = Gpu(), 0
    for one, predicted in zip(grid, predictions, strict=True):
        if end - time.monotonic() < 15:
            yield Row(one, predicted, NO_TIME)
            continue
        if isinstance(predicted, str):
            yield Row(one, predicted, NOT_PREDICTED)
            continue
        measured, failure = None, "does not fit this card"
        free = wait_for_memory(card, free)  # until the run before has given back all it took
        if predicted.tensors < card.memory()[1]:
            left = end - time.monotonic()
            measured, failure = in_fresh_process(context, left, measure_on_gpu, one, free)
        yield Row(one, predicted, measured or str(failure))


def _predict_all(context: Any, grid: Sequence[Combination], end: float) -> list[Peak | str]:
    """Predict several peaks at once, each in a process that may fail, die or hang."""

    def outcome(one: Combination) -> Peak | str:
        left = end - time.monotonic()
        if left <= 0:
            return NO_TIME
        predicted, failure = in_fresh_process(context, left, predict, one, "cuda")
        return predicted or str(failure)

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 4) // 2)) as pool:
        return list(pool.map(outcome, grid))


def report(row: Row, number: int, count: int) -> None:
    result = row.measured if row.ratio is None else f"{row.ratio:.4f}"
    print(f"{number}/{count}", *row.combination.settings, result, file=sys.stderr, flush=True)


# ---- the table


SETTINGS = (
    *("model", "precision", "optimizer", "state", "batch"),
    *("checkpointing", "chunked loss", "released"),
)
ON_CPU = ("tensors: predicted", "measured", "ratio")
ON_GPU = (
    *(*ON_CPU, "workspaces: predicted", "measured"),
    *("on the card: predicted", "measured", "ratio"),
)


def table(rows: Sequence[Row], device: str) -> list[str]:
    """Every cell has a figure, or the reason why there is none."""
    columns = ON_GPU if device == "cuda" else ON_CPU
    cells = []
    for row in rows:
        model, precision, optimizer, state, micro, times, kept, *switches = row.combination.settings
        settings = [model, precision, optimizer, state, f"{times} x {micro}", kept]
        settings += ["yes" if switch else "no" for switch in switches]
        predicted, measured = row.predicted, row.measured
        figures = [_size(predicted, "tensors"), _size(measured, "tensors"), _ratio(row.ratio)]
        figures += [_size(predicted, "workspace"), _size(measured, "workspace")]
        figures += [_size(predicted, "device"), _size(measured, "device")]
        figures += [_ratio(row.ratio_on_card)]
        cells.append([str(cell) for cell in (*settings, *figures[: len(columns)])])
    return markdown_table([*SETTINGS, *columns], cells).splitlines()


def _size(peak: Peak | str, field: str) -> str:
    if isinstance(peak, str):
        return peak
    size = getattr(peak, field)
    return ONLY_TENSORS if size is None else format_bytes(size)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.4f}"


def summary(rows: Sequence[Row]) -> list[str]:
    """Summarize the ratios, and count the predictions that are too low."""
    foam = [row for row in rows if row.combination.is_foam]
    kinds: dict[str, list[float | None]] = {
        "all, tensors": [row.ratio for row in rows],
        "FOAM, by the account": [row.ratio for row in foam],
        "AdamW, by a trace": [row.ratio for row in rows if not row.combination.is_foam],
        "FOAM, on the card": [row.ratio_on_card for row in foam],
    }
    cells = []
    for kind, of_kind in kinds.items():
        ratios = [ratio for ratio in of_kind if ratio is not None]
        if ratios:
            spread = (min(ratios), statistics.median(ratios), max(ratios))
            off = sum(abs(ratio - 1) > 0.01 for ratio in ratios)
            under = sum(ratio < UNDER for ratio in ratios)
            figures = [*(f"{ratio:.4f}" for ratio in spread), str(off), str(under)]
            cells.append([kind, str(len(ratios)), *figures])
    columns = ["predicted / measured", "runs", "min", "median", "max", "off by more than 1 %"]
    columns.append("under-predicted by more than .5 %")
    return markdown_table(columns, cells).splitlines()


def heading(words: Sequence[str], device: str) -> list[str]:
    hardware = machine()
    if device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {hardware}"
    return [
        "# Predicted and measured peaks",
        "",
        f"- command: `{shlex.join(['python', '-m', 'tests.benchmarks.memory_truth', *words])}`",
        f"- {commit_and_date()}, seed 0",
        f"- {hardware}",
        f"- {packages('torch', 'lightning', 'transformers')}",
        f"- rows of at most {MOST_TOKENS[device]} tokens; the mixed plan repeats levels "
        f"{', '.join(map(str, MIXED_LEVELS))}",
        "",
        "Batch: micro-batches a step x rows in each. A run is two optimizer steps, the curve of "
        "the residual and an evaluation by Lightning's trainer. "
        + (
            "Tensors: what torch had allocated at most, less what stays allocated when the run is "
            "over; that is workspaces, of cuBLAS above all. On the card: what torch had reserved "
            f"at most and the context. {ONLY_TENSORS}: AdamW has no account, only a trace."
            if device == "cuda"
            else "Measured: the storages of all tensors alive at once at most, from the first "
            "step to the end; what an operator takes inside itself is not seen."
        ),
        "",
    ]


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="on a GPU, at most")
    parser.add_argument("--count", type=int, help="combinations; fewer leave pairs out")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none; leave it out for the CPU")
    quiet()
    if device == "cpu":
        torch.set_num_threads(1)
    if device == "cuda":
        calibrate(Gpu())  # so that the runs are predicted with its context
    count = arguments.count or COUNTS[device]
    grid = choose(MODELS[device], MICRO_BATCHES[device], count, with_offload=device == "cuda")
    runs = run_on_cpu(grid) if device == "cpu" else run_on_gpu(grid, arguments.minutes * 60 - 20)
    rows: list[Row] = []
    for row in runs:
        rows.append(row)
        report(row, len(rows), len(grid))
    lines = [*heading(words, device), *summary(rows), "", *table(rows, device)]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
