"""The predicted peak beside the measured one, over training settings of which every pair occurs.

    python -m tests.benchmarks.memory_truth [--output FILE]
    python -m tests.benchmarks.memory_truth --device cuda [--minutes 9] [--output FILE]

Measured are runs of Lightning's trainer as a rehearsal is: two optimizer steps and an evaluation.
On a CPU every storage of the run is tracked; on a GPU, torch counts what is allocated, and the
card what the process takes in all. There every run has a process of its own, and before the
others LLaMA 7B trains 20 steps with gradients released inside 24 GB that it cannot leave.
"""

import argparse
import datetime
import logging
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from foam_lightning import FOAM
from foam_lightning.callbacks.folding import ResidualEnergy
from foam_lightning.job import Job
from foam_lightning.memory.levers import leanest
from foam_lightning.memory.trace import autocast_for, fake_tensors, track_step
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.units import in_words
from tests.benchmarks.combinations import FOREACH, LEVELS, Combination, choose
from tests.benchmarks.heading import ROOT, commit, packages, processor
from tuner.settings import parse

SMALL = ("default", "llama_20m")
MODELS = {"cpu": SMALL, "cuda": (*SMALL, "llama_60m", "llama_130m", "llama_350m", "llama_1b")}
MICRO_BATCHES = {"cpu": (1, 2, 4), "cuda": (1, 4, 16)}
COUNTS = {"cpu": 48, "cuda": 60}
MOST_TOKENS = {"cpu": 128, "cuda": 2**20}  # in a row: a CPU takes minutes for longer ones
WALL_MODEL, WALL_BYTES, WALL_STEPS, WALL_BATCH = "llama_7b", 24 * 10**9, 20, 4
UNDER = 0.995
MIXED_LEVELS = (0, 3, 1, 8)
VOCABULARY = 300


@dataclass(frozen=True)
class Peak:
    """What a run takes at most, in bytes.

    Attributes:
        tensors: In tensors.
        device: On the card in all: what the allocator reserves and the context beside it. None on
            a CPU, and predicted for AdamW, of which the account knows no more than the tensors.
        retries: How often the allocator had to free its cache to go on.
    """

    tensors: int
    device: int | None = None
    retries: int = 0


@dataclass(frozen=True)
class Row:
    """One combination: predicted, and measured or why not."""

    combination: Combination
    predicted: Peak
    measured: Peak | str

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return (
            None
            if isinstance(self.measured, str)
            else self.predicted.tensors / self.measured.tensors
        )


# ---- what is run


def job_of(one: Combination, device: str, text: Path, **data: Any) -> Job:
    """Make the job: the model of a file of configs/, on text of which only the length matters."""
    job = parse("fit", [], default=ROOT / "configs" / f"{one.model}.yaml").job()
    length = min(int(job.data["sequence_length"]), MOST_TOKENS[device])
    source = {
        "files": [str(text)],
        "cache_dir": str(text.parent / "cache"),
        "vocab_size": VOCABULARY,  # of the tokenizer; the model keeps its own
        "sequence_length": length,
        "batch_size": one.levers.batch_size,
        "micro_batch_size": one.levers.micro_batch_size,
        "validation_sequences": one.levers.micro_batch_size,
    }
    source |= {"dataset": None, "dataset_config": None, "streaming": False, "tokenizer": None}
    trainer = {"accelerator": device, "devices": 1, "precision": one.precision, "max_steps": 2}
    return replace(
        job,
        data={**job.data, **source, "packing": True, **data},
        trainer={**job.trainer, **trainer},
    )


def plan_of(module: LlamaFoam, one: Combination) -> FoldPlan:
    level = LEVELS.get(one.optimizer, 0)
    if level is not None:
        return module.uniform_plan(level, one.levers)
    plan = module.uniform_plan(0, one.levers)
    levels = {name: MIXED_LEVELS[i % len(MIXED_LEVELS)] for i, name in enumerate(plan.levels)}
    return replace(plan, levels=levels, scales=dict.fromkeys(MIXED_LEVELS, 0.1))


def new_adamw(
    named_parameters: Iterable[tuple[str, Tensor]], _plan: object = None, *, foreach: bool
) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in named_parameters], foreach=foreach)


def write_text(folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("".join(f"{i} and {i * i % 97} make {i * 3}.\n" for i in range(20_000)))
    return text


# ---- predicted


def predict(one: Combination, device: str, text: Path) -> Peak:
    """Predict the peak: of FOAM by the account, of AdamW by a trace of a whole step."""
    job = job_of(one, device, text)
    module = job.new_module()
    if one.is_foam:
        accountant, plan = job.new_accountant(), plan_of(module, one)
        tensors = sum(accountant.trace(plan).values())
        return Peak(tensors, accountant.account(plan).peak_bytes if device == "cuda" else None)
    size = (one.levers.micro_batch_size, int(job.data["sequence_length"]))

    def make_batch() -> tuple[Tensor, Tensor]:
        token_ids = torch.zeros(size, dtype=torch.int64)
        return token_ids, token_ids

    with fake_tensors(job.precision):
        twin = module.layered(one.levers, module.llama_config().num_hidden_layers)
        optimizer = new_adamw(twin.named_parameters(), foreach=FOREACH[one.optimizer])
        step = track_step(
            twin,
            cast(FOAM, optimizer),  # to release gradients it must be; AdamW does not
            make_batch,
            accumulate_grad_batches=one.levers.accumulate_grad_batches,
            autocast=autocast_for(job.precision),
        )
    return Peak(step.peak.total_bytes)


# ---- measured


class Watch(Callback):
    """Track every storage from the start of training to the end of the run."""

    def __init__(self) -> None:
        self.tracker = StorageTracker()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tracker.claim(pl_module.parameters(), "weights")
        self.tracker.__enter__()  # type: ignore[no-untyped-call]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tracker.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def train(job: Job, one: Combination, callbacks: Sequence[Callback], num_steps: int = 2) -> Trainer:
    """Run the steps and an evaluation, as a rehearsal does, with the curve of the residual."""
    module = job.new_module()
    plan = plan_of(module, one)
    module.follow(plan)
    if not one.is_foam:
        module.make_optimizer = partial(new_adamw, foreach=FOREACH[one.optimizer])  # type: ignore[method-assign, assignment]
    trainer = job.new_trainer(
        plan.levers,
        [*callbacks, ResidualEnergy()],
        bare=True,
        max_steps=num_steps,
        limit_val_batches=1,
        val_check_interval=num_steps,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=job.new_data(plan.levers))
    assert trainer.global_step == num_steps
    return trainer


def measure_on_cpu(one: Combination, text: Path) -> Peak:
    watch = Watch()
    train(job_of(one, "cpu", text), one, [watch])
    return Peak(watch.tracker.peak().total_bytes)


def measure_on_gpu(
    one: Combination,
    text: Path,
    free_before: int,
    num_steps: int = 2,
    wall_bytes: int | None = None,
) -> Peak:
    """Measure in this process, which has not used the GPU before and is not used again.

    Args:
        one: What to train.
        text: On what.
        free_before: Bytes of the card that were free before this process began.
        num_steps: How long.
        wall_bytes: What the process may take of the card at most, its context included.
    """
    quiet()
    square = torch.ones(8, 8, device="cuda", dtype=torch.bfloat16)
    (square @ square).sum().item()  # so that what belongs to the context is there
    if wall_bytes is not None:
        context = free_before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((wall_bytes - context) / total)
    train(job_of(one, "cuda", text, validation_sequences=1), one, [], num_steps)
    torch.cuda.synchronize()
    context = free_before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    return Peak(
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved() + context,
        int(torch.cuda.memory_stats()["num_alloc_retries"]),
    )


def in_fresh_process(
    context: Any, seconds: float, function: Callable[..., Peak], *arguments: object
) -> Peak | str:
    """Call a function in a process of its own; give what it returns, or why it does not."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return f"not done after {seconds:.0f} s"
        return cast("Peak | str", receiver.recv())
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, function: Callable[..., Peak], arguments: Any) -> None:
    try:
        sender.send(function(*arguments))
    except Exception as error:  # whatever it is, it is this row's, and the others go on
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")


# ---- the grid


def run_on_cpu(grid: Sequence[Combination], text: Path) -> list[Row]:
    rows = []
    for one in grid:
        rows.append(Row(one, predict(one, "cpu", text), measure_on_cpu(one, text)))
        report(rows[-1], len(rows), len(grid))
    return rows


def run_on_gpu(
    grid: Sequence[Combination], text: Path, seconds: float
) -> tuple[list[Row], list[str]]:
    """Run the wall, then the grid as far as the time goes."""
    end = time.monotonic() + seconds
    # Asking by NVML leaves a process whose children will use the GPU as it was.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.memory_truth", "transformers"])
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(max(2, (os.cpu_count() or 4) // 2), mp_context=context)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        of_wall = pool.submit(predict, wall(), "cuda", text)
        predictions = [pool.submit(predict, one, "cuda", text) for one in grid]
        free, total = torch.cuda.mem_get_info()
        measured = in_fresh_process(
            context, seconds / 2, measure_on_gpu, wall(), text, free, WALL_STEPS, WALL_BYTES
        )
        inside = Row(wall(), of_wall.result(), measured)
        report(inside, 0, len(grid))
        rows: list[Row] = []
        for one, prediction in zip(grid, predictions, strict=True):
            left = end - time.monotonic()
            if left < 15:
                break
            predicted = prediction.result(left)
            fits = predicted.tensors < total
            rows.append(
                Row(
                    one,
                    predicted,
                    in_fresh_process(context, left, measure_on_gpu, one, text, free)
                    if fits
                    else "does not fit this card",
                )
            )
            report(rows[-1], len(rows), len(grid))
    return rows, wall_lines(inside)


def wall() -> Combination:
    """Train as `fit` would inside 24 GB: the leanest levers, and level 2."""
    start = Levers(micro_batch_size=WALL_BATCH, state_dtype="bfloat16")
    return Combination(WALL_MODEL, "bf16-true", "FOAM 2", leanest(start)[-1])


def report(row: Row, number: int, count: int) -> None:
    result = row.measured if row.ratio is None else f"{row.ratio:.4f}"
    print(f"{number}/{count}", *row.combination.settings, result, file=sys.stderr, flush=True)


# ---- the table


def wall_lines(row: Row) -> list[str]:
    name = f"{WALL_MODEL}, {WALL_STEPS} steps inside {in_words(WALL_BYTES)}, context included"
    if isinstance(row.measured, str):
        return ["", f"{name}: {row.measured}."]
    predicted, measured = row.predicted, row.measured
    return [
        "",
        f"{name}: tensors {in_words(predicted.tensors)} predicted, {in_words(measured.tensors)} "
        f"measured; on the card {in_words(predicted.device or 0)} predicted, "
        f"{in_words(measured.device or 0)} measured; {measured.retries} allocator retries.",
    ]


def table(rows: Sequence[Row], device: str) -> list[str]:
    on_gpu = device == "cuda"
    lines = [
        "| model | precision | optimizer | state | batch | checkpointing | chunked loss | released "
        "| predicted | measured | ratio |" + " on the card, predicted | measured |" * on_gpu,
        "|---|---|---|---|---|---|---|---|---|---|---|" + "---|---|" * on_gpu,
    ]
    for row in rows:
        model, precision, optimizer, state, micro, times, *switches = row.combination.settings
        cells = [model, precision, optimizer, state, f"{times} x {micro}"]
        cells += ["yes" if switch else "" for switch in switches]
        cells += [in_words(row.predicted.tensors)]
        if isinstance(row.measured, str):
            cells += [row.measured, ""] + ["", ""] * on_gpu
        else:
            cells += [in_words(row.measured.tensors), f"{row.ratio:.4f}"]
            if on_gpu:
                cells += [
                    "" if peak.device is None else in_words(peak.device)
                    for peak in (row.predicted, row.measured)
                ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """Give the ratios in three numbers, and how many predictions are too low."""
    lines = [
        "| predicted / measured | runs | min | median | max | off by more than 1 % | "
        "under-predicted by more than .5 % |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = {
        "all": rows,
        "FOAM, by the account": [row for row in rows if row.combination.is_foam],
        "AdamW, by a trace": [row for row in rows if not row.combination.is_foam],
    }
    for kind, of_kind in kinds.items():
        ratios = [row.ratio for row in of_kind if row.ratio is not None]
        if ratios:
            lines.append(
                f"| {kind} | {len(ratios)} | {min(ratios):.4f} | {statistics.median(ratios):.4f} | "
                f"{max(ratios):.4f} | {sum(abs(ratio - 1) > 0.01 for ratio in ratios)} | "
                f"{sum(ratio < UNDER for ratio in ratios)} |"
            )
    return lines


def heading(words: Sequence[str], device: str) -> list[str]:
    machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {machine}"
    return [
        "# Predicted and measured peaks",
        "",
        f"- command: `{shlex.join(['python', '-m', 'tests.benchmarks.memory_truth', *words])}`",
        f"- commit {commit()}, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, seed 0",
        f"- {machine}",
        f"- {packages('torch', 'lightning', 'transformers')}",
        f"- rows of at most {MOST_TOKENS[device]} tokens; the mixed plan repeats levels "
        f"{', '.join(map(str, MIXED_LEVELS))}",
        "",
        "Batch: micro-batches a step x rows in each. A run is two optimizer steps, the curve of "
        "the residual and an evaluation by Lightning's trainer. "
        + (
            "Measured: what torch had allocated at most, and what the process took of the card."
            if device == "cuda"
            else "Measured: the storages of all tensors alive at once at most, from the first "
            "step to the end; what an operator takes inside itself is not seen."
        ),
        "",
    ]


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


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
    grid = choose(MODELS[device], MICRO_BATCHES[device], arguments.count or COUNTS[device])
    extra: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        if device == "cuda":
            rows, extra = run_on_gpu(grid, text, arguments.minutes * 60 - 20)
        else:
            rows = run_on_cpu(grid, text)
    if len(rows) < len(grid):
        extra += ["", f"No time for {len(grid) - len(rows)} of {len(grid)} combinations."]
    lines = [*heading(words, device), *summary(rows), *extra, "", *table(rows, device)]
    page = "\n".join(lines) + "\n"
    print(page)
    if arguments.output is not None:
        arguments.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
