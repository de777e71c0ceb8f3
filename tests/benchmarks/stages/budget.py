"""A LLaMA in a hard memory budget: losses, retries and true use of the card at every step."""

import gc
import time
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from foam_lightning.errors import first_line
from foam_lightning.memory.device import Gpu, calibrate, is_out_of_memory, memory_cap
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.plan import FoldPlan
from foam_lightning.units import ByteSize, format_bytes
from tests.benchmarks.memory_runs import quiet
from tests.benchmarks.stages.checks import free_before_context
from tests.benchmarks.stages.record import Record, Setting
from tests.benchmarks.token_job import TokenJob, read_job
from tuner.planning.planner import BudgetPlanner, mean_level

STEPS, BATCH = 20, 4
LR = 1e-3  # for so few steps; with that of the recipe the loss rises first
BUDGET, TINY_BUDGET = ByteSize("24GB"), ByteSize("14MB")
# meta-llama/Meta-Llama-3-8B, config.json
LLAMA3_8B = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
TINY_LLAMA3 = {"num_key_value_heads": 2, "vocab_size": 1280}


def train_llama_7b(setting: Setting) -> None:
    _train(setting, {})


def train_llama3_8b(setting: Setting) -> None:
    _train(setting, TINY_LLAMA3 if setting.tiny else LLAMA3_8B)


def _train(setting: Setting, sizes: dict[str, Any]) -> None:
    """Train on random weights and tokens by the plan that `plan` would choose; save nothing."""
    quiet()
    record, budget = setting.record, TINY_BUDGET if setting.tiny else BUDGET
    free_before, outside, not_told = None, 0, None
    if setting.on_gpu:
        free_before, not_told = free_before_context()
        outside = calibrate(Gpu()).context
    job = TokenJob.random(
        read_job(
            "default" if setting.tiny else "llama_7b",
            device=setting.device,
            model={"lr": LR, **sizes},
            data={"batch_size": BATCH},
            trainer={"max_steps": STEPS},
        )
    )
    planner = BudgetPlanner(job, budget)
    plan = planner.default_plan()
    predicted = planner.accountant.account(plan)
    # What the plan keeps free is not to be used.
    predicted_bytes = predicted.peak_bytes - predicted.breakdown["slack"]
    options = [name for name, on in vars(plan.memory_options).items() if on is True]
    record.note(
        f"{BATCH} rows of {job.data.sequence_length} random tokens, the same in every step; plan "
        f"for {budget}: levels {mean_level(plan):.2f} on average, up to "
        f"{max(plan.levels.values())}, {plan.memory_options.state_dtype} state, "
        f"micro-batches of {plan.memory_options.micro_batch_size}, "
        f"{', '.join(options).replace('_', ' ') or 'no further options'}. Predicted: "
        + ", ".join(f"{term} {format_bytes(size)}" for term, size in predicted.breakdown.items())
        + f"; {format_bytes(predicted.peak_bytes)} in all."
        + (f" {not_told}" if not_told else "")
    )
    common = {"predicted_bytes": predicted_bytes, "budget_bytes": int(budget)}
    watch = _Watch(record, common, free_before)
    try:
        with memory_cap(Gpu(), budget, outside) if setting.on_gpu else nullcontext():
            _fit(job, plan, watch)
        record.note(watch.summary(budget))
    except Exception as error:
        if not (setting.on_gpu and is_out_of_memory(error)):
            raise
        reason = f"memory ran out after {watch.num_steps} steps: {first_line(error)}"
        record.row("in the budget", failure=reason)
    else:
        return
    gc.collect()
    Gpu().reset_peaks()
    watch = _Watch(record, common, free_before)  # without the cap, to see what it needs
    _fit(job, plan, watch)
    record.note(f"In the budget, {reason}. Without a cap: {watch.summary(budget)}")


def _fit(job: TokenJob, plan: FoldPlan, watch: "_Watch") -> None:
    module = job.new_module()
    module.set_plan(plan)
    trainer = job.new_trainer(
        plan.memory_options, [watch], bare=True, limit_val_batches=0, val_check_interval=None
    )
    trainer.fit(module, datamodule=job.new_data(plan.memory_options))


class _Watch(Callback):
    """Make a row of every step. On a CPU the peak is that of all tensors since the first step."""

    def __init__(self, record: Record, common: dict[str, int], free_before: int | None) -> None:
        self._record, self._common, self._free_before = record, common, free_before
        self._tracker = StorageTracker()
        self._since = 0.0
        self._steps: list[dict[str, Any]] = []
        self._loss = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._free_before is None:
            self._tracker.claim(pl_module.parameters(), "weights")
            self._tracker.__enter__()
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._loss += float(outputs["loss"])  # waits for the GPU; accumulated ones are divided
        if trainer.global_step == len(self._steps):
            return
        now = time.perf_counter()
        step = {"loss": self._loss, **self._memory(), **self._common}
        step["step_seconds"] = now - self._since
        self._steps.append(step)
        self._record.row(f"step {len(self._steps)}", **step)
        self._since, self._loss = time.perf_counter(), 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._free_before is None:
            self._tracker.__exit__(None, None, None)

    def _memory(self) -> dict[str, int]:
        if self._free_before is None:
            return {"peak_bytes": self._tracker.peak().total_bytes}
        used = self._free_before - torch.cuda.mem_get_info()[0]
        stats = torch.cuda.memory_stats()
        reserved = stats["reserved_bytes.all.peak"]
        return {
            "peak_bytes": used - stats["reserved_bytes.all.current"] + reserved,
            "used_bytes": used,
            "reserved_peak_bytes": reserved,
            "allocated_peak_bytes": stats["allocated_bytes.all.peak"],
            "retries": int(stats["num_alloc_retries"]),
        }

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    def summary(self, budget: int) -> str:
        first, last = self._steps[0], self._steps[-1]
        peak = max(step["peak_bytes"] for step in self._steps)
        predicted = self._common["predicted_bytes"]
        verb = "fell" if last["loss"] < first["loss"] else "did not fall"
        inside = "inside" if peak <= budget else "ABOVE"
        retries = f", {last['retries']} allocator retries" if "retries" in last else ""
        return (
            f"{len(self._steps)} steps: the loss {verb}, from {first['loss']:.4f} to "
            f"{last['loss']:.4f}; the measured peak of {format_bytes(peak)} is {inside} the "
            f"budget of {ByteSize(budget)}; predicted / measured {predicted / peak:.4f}{retries}."
        )
