"""FOAM beside Adam on text: loss, speed, state and peak, with equal seeds and batches."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from foam_lightning.callbacks.throughput import flops_per_token, peak_flops
from foam_lightning.data.cache import cache_folder
from foam_lightning.data.files import read_documents
from foam_lightning.data.sources import python_library_documents
from foam_lightning.data.tokenizer import build_tokenizer, encode, end_of_text_id
from foam_lightning.job import Job
from foam_lightning.optim.plain_state import measure_state_bytes
from foam_lightning.plan import FoldPlan
from tests.benchmarks.memory_runs import quiet
from tests.benchmarks.stages.record import Setting
from tests.benchmarks.token_job import TokenJob, read_job
from tuner.planning.levels import DEFAULT_KNOBS
from tuner.planning.planner import BudgetPlanner
from tuner.planning.scales import combine_plans
from tuner.trials.runner import StepClock, TrialResult, TrialRunner, paired_difference

SEEDS, TINY_SEEDS = 3, 1
STEPS, BATCH = 300, 128
TINY_STEPS, TINY_BATCH, TINY_CHARACTERS = 12, 8, 300_000
MOST_CHARACTERS = 20_000_000
HELD_OUT_EVERY = 20
TEXT = (".txt", ".jsonl", ".parquet")
# Plain AdamW has one learning rate for all tensors, and needs about a tenth of FOAM's.
ADAMW_FACTOR = 0.1
ADAM, SPLIT_ADAM, UNIFORM, MIXED = "AdamW", "split-lr Adam", "FOAM level 2", "FOAM mixed"


def train_60m(setting: Setting) -> None:
    """Train llama_60m on rows of 256 tokens, seed by seed, as far as the time goes."""
    quiet()
    job = _job(setting)
    steps = job.trainer.max_steps
    setting.record.note(
        f"{steps} steps of {job.data.batch_size} rows of {job.data.sequence_length} tokens from "
        f"{len(job.train)} rows; float32 weights and state, {job.trainer.precision}; "
        f"{len(job.validation)} rows to evaluate on. Speed: the median step of the second half."
    )
    runs: dict[str, list[TrialResult]] = {}
    contenders = _contenders(job)
    longest = 0.0
    for seed in range(TINY_SEEDS if setting.tiny else SEEDS):
        for name, (runner, plan) in contenders.items():
            row = f"seed {seed}, {name}"
            if setting.record.has(row):
                continue
            if setting.seconds_left() < 1.2 * longest + 3:
                setting.record.row(row, failure="no time left")
                continue
            begin = time.monotonic()
            clock, watch = StepClock(), _Watch()
            try:
                result = runner.run(plan, num_steps=steps, seed=seed, callbacks=[clock, watch])
            except Exception as error:  # this run's alone
                setting.record.row(row, failure=f"{type(error).__name__}: {error}"[:300])
                continue
            longest = max(longest, time.monotonic() - begin)
            runs.setdefault(name, []).append(result)
            setting.record.row(row, loss=result.loss, **_speed(clock, job), **watch.found)
    gaps = []
    for name, others in ((UNIFORM, ADAM), (UNIFORM, SPLIT_ADAM), (MIXED, SPLIT_ADAM)):
        count = min(len(runs.get(name, [])), len(runs.get(others, [])))
        if count:
            gap = paired_difference(runs[name][:count], runs[others][:count])
            gaps.append(f"{name} - {others}: {gap}")
    if gaps:
        setting.record.note(f"Loss in nats, on {count} seeds of {steps} steps: {'; '.join(gaps)}.")


def _contenders(job: TokenJob) -> dict[str, tuple[TrialRunner, FoldPlan]]:
    def baseline(name: Any, factor: float) -> tuple[TrialRunner, FoldPlan]:
        model = replace(job.model, optimizer=name, lr=job.model.lr * factor)
        own: Job = replace(job, model=model)
        return TrialRunner(own), own.configured_plan()

    planner, runner = BudgetPlanner(job, None), TrialRunner(job)
    adam, uniform = planner.uniform(0), planner.uniform(2)
    levels = planner.levels_for(DEFAULT_KNOBS, planner.folded_state_bytes(uniform))
    return {
        UNIFORM: (runner, uniform),
        SPLIT_ADAM: baseline("split_adamw", 1.0),
        ADAM: baseline("adamw", ADAMW_FACTOR),
        MIXED: (runner, combine_plans(levels, unfolded=adam, folded=uniform)),
    }


def _job(setting: Setting) -> TokenJob:
    batch = TINY_BATCH if setting.tiny else BATCH
    job = read_job(
        "default" if setting.tiny else "llama_60m",
        device=setting.device,
        model={"state_dtype": "float32"},
        data={"batch_size": batch, "micro_batch_size": batch},
        trainer={
            "precision": "bf16-mixed" if setting.on_gpu else "32-true",
            "max_steps": TINY_STEPS if setting.tiny else STEPS,
        },
    )
    length = job.data.sequence_length
    tokens = read_tokens(setting, job.model.vocab_size)
    rows = torch.from_numpy(tokens[: len(tokens) // length * length].reshape(-1, length))
    is_held_out = torch.arange(len(rows)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return TokenJob.of(job, rows[~is_held_out], rows[is_held_out][: 32 * batch])


def read_tokens(setting: Setting, vocab_size: int) -> NDArray[np.int32]:
    """Read the tokens of the text, by a tokenizer that is trained on it; or .npy files of them."""
    if arrays := setting.text_files(".npy"):
        found = np.concatenate([np.load(file).ravel() for file in arrays]).astype(np.int32)
        if int(found.max()) >= vocab_size:
            raise ValueError(f"token {found.max()} is not below the vocabulary of {vocab_size}")
        return found
    most = TINY_CHARACTERS if setting.tiny else MOST_CHARACTERS
    texts = list(_first_characters(_read(setting.text_files(*TEXT)), most))
    documents: Any = [{"text": text} for text in texts]
    tokenizer = build_tokenizer(
        None, vocab_size=vocab_size, documents=documents, cache=cache_folder(None)
    )
    end = [end_of_text_id(tokenizer)]
    pieces = encode(tokenizer, texts)
    ids = chain.from_iterable(piece.ids + (end if piece.ends else []) for piece in pieces)
    return np.fromiter(ids, dtype=np.int32)


def _read(files: list[Path]) -> Iterator[str]:
    if not files:
        return (text for _, text in python_library_documents())
    return (text for file in files for _, text in read_documents(file, "text"))


def _first_characters(texts: Iterator[str], most: int) -> Iterator[str]:
    for text in texts:
        yield text[:most]
        most -= len(text)
        if most <= 0:
            return


def _speed(clock: StepClock, job: TokenJob) -> dict[str, Any]:
    times = [after - before for before, after in pairwise(clock.times)]
    seconds = statistics.median(times[len(times) // 2 :])
    length = job.data.sequence_length
    tokens = job.data.batch_size * length / seconds
    values = {"step_seconds": seconds, "tokens_per_second": tokens}
    device = torch.device(str(job.trainer.arguments["accelerator"]))
    peak = peak_flops(device, job.trainer.precision)
    if peak:
        values["mfu"] = tokens * flops_per_token(job.new_module().shapes, length) / peak
    return values


class _Watch(Callback):
    """Read the bytes of the state, and on a GPU the peak of a run."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["state_bytes"] = measure_state_bytes(trainer.optimizers[0])
        if pl_module.device.type == "cuda":
            self.found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
