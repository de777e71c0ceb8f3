"""Runs that are stopped and resumed, to compare with runs that are not."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from foam_lightning.callbacks import spike_guard as spike_guards
from foam_lightning.callbacks.exact_resume import ExactResume
from foam_lightning.callbacks.spike_guard import SpikeGuard, StepPolicy
from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.data import streaming
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from tests.support.planted import Plant
from tests.support.runs import QUIET, NewJob

# The keys of a checkpoint that affect what follows; the others are statistics of Lightning.
_DECISIVE = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "ranks", "callbacks")
_UNUSED = {"_base_seed"}  # seeds workers that draw random numbers, which ours do not


def data_of(kind: str, folder: Path) -> dict[str, Any]:
    """Write texts of which an epoch is 3 to 7 steps, and return their data settings."""
    lines = [f"{i} and {i * i % 97} make {i * 3}." for i in range(60)]
    files = [folder / f"{number}.jsonl" for number in range(2)]
    for number, file in enumerate(files):
        texts = lines[number::2]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    paths = [str(file) for file in files]
    own = {"cache_dir": str(folder / "cache")}
    if kind == "mixture":
        sources = [
            {"files": [path], "validation_files": paths, "weight": 1 + i}
            for i, path in enumerate(paths)
        ]
        return {**own, "files": None, "sources": sources}
    if kind == "stream":
        return {**own, "files": paths, "validation_files": paths[:1], "streaming": True}
    return {**own, "files": paths}


class Rows(Callback):
    """Record the rows of every step, and the steps before an evaluation."""

    def __init__(self) -> None:
        self.rows: list[list[list[int]]] = []
        self.evaluated: list[int] = []
        self._parts: list[list[int]] = []

    def on_train_batch_end(
        self, trainer: Trainer, _: LightningModule, outputs: Any, batch: Any, number: int
    ) -> None:
        self._parts += batch["input_ids"].tolist()
        if (number + 1) % trainer.accumulate_grad_batches == 0:
            self.rows.append(self._parts)
            self._parts = []

    def on_validation_end(self, trainer: Trainer, _: LightningModule) -> None:
        self.evaluated.append(trainer.global_step)


@dataclass
class Log(Callback):
    """Record the loss of every step over all ranks, and save after some steps."""

    folder: Path = Path()
    saves: Collection[int] = ()
    losses: list[float] = field(default_factory=list)
    _parts: list[float] = field(default_factory=list)

    def on_train_batch_end(
        self, trainer: Trainer, _: LightningModule, outputs: Any, *__: Any
    ) -> None:
        # Lightning has divided each by the number of micro-batches.
        self._parts.append(float(trainer.strategy.reduce(outputs["loss"].clone())))
        if len(self._parts) == trainer.accumulate_grad_batches:
            self.losses.append(sum(self._parts))
            self._parts.clear()
            if trainer.global_step in self.saves:
                trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(
    job: Job,
    plan: FoldPlan,
    folder: Path,
    *callbacks: Callback,
    start: Path | None = None,
    stops: Collection[int] = (),
) -> list[float]:
    """Train from a checkpoint or from the beginning, and return the loss of every step.

    Args:
        job: What to train.
        plan: Its plan.
        folder: Gets a checkpoint of the last step.
        callbacks: Callbacks that come first.
        start: The checkpoint, to which a spike also rolls back.
        stops: Steps after which to save a checkpoint as well.
    """
    module, log = job.new_module(), Log(folder, {*stops, job.trainer.max_steps})
    module.set_plan(plan)
    spike_guard = SpikeGuard(
        StepPolicy(max_skipped_steps=1, spike_nats=1.0, max_rollbacks=1),
        start or folder / "none.ckpt",
    )
    trainer = job.new_trainer(
        plan.memory_options,
        [*callbacks, spike_guard, ExactResume(), log],
        **QUIET,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(
        module, datamodule=job.new_data(plan.memory_options), ckpt_path=start, weights_only=True
    )
    return log.losses


def differences(path: Path, other: Path) -> list[str]:
    """Return the keys that differ between two checkpoints and affect what follows."""
    contents = [read_checkpoint(one) for one in (path, other)]
    return [key for key in _DECISIVE if not same(*(content[key] for content in contents))]


def same(left: Any, right: Any) -> bool:
    """Return whether two trees of tensors and numbers are equal, bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        keys = left.keys() - _UNUSED
        return keys == right.keys() - _UNUSED and all(same(left[key], right[key]) for key in keys)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


# ---- two processes

WORLD = 2
STEPS, STOP = 6, 3
# Characters of a stream that are shuffled together: few, so that ranks have different positions.
BLOCK = 150
STOPPED: dict[str, dict[str, Any]] = {
    "ddp": {"micro": 2, "data": "rows", "num_workers": 2},
    "fsdp2": {"micro": 2, "data": "rows", "num_workers": 2},
    "ddp bf16-true": {"state": "bfloat16", "data": "stream", "num_workers": 2},
    "fsdp2 bf16-true": {"state": "bfloat16", "data": "stream"},
    "ddp 32-true": {"state": "int8", "data": "mixture"},
    "fsdp2 bf16-mixed": {"state": "int8", "data": "rows"},
}


class Stoppable(NamedTuple):
    """A run to stop and resume, also from a checkpoint of one process if there is one."""

    job: Job
    plan: FoldPlan
    folder: Path
    one: Path | None = None


def stoppable(new_job: NewJob, folder: Path, name: str) -> Stoppable:
    """Make one of `STOPPED`, or the run of one process that equals the first two of them."""
    settings = STOPPED.get(name, STOPPED["ddp"])
    strategy, _, precision = name.partition(" ")
    folder.mkdir(exist_ok=True)
    job = new_job(
        model={"state_dtype": settings.get("state", "float32")},
        data={
            **data_of(settings["data"], folder.parent),  # of all, as other paths are other text
            "micro_batch_size": settings.get("micro"),
            "num_workers": settings.get("num_workers", 0),
        },
        trainer={
            "max_steps": STEPS,
            "val_check_interval": 3,
            "precision": precision or "32-true",
            **({} if name == "one" else {"devices": WORLD, "strategy": strategy}),
        },
    )
    plan = job.with_one_device().uniform_plan(2)
    return Stoppable(job, job.adapt_plan(plan, num_devices=1), folder)


def part_of_two(run: Stoppable) -> dict[str, list[float]]:
    """Train as one of two ranks: whole, resumed, resumed from one process, and past a spike."""
    spike_guards._STEPS_BEFORE_SPIKES = 2
    streaming._BLOCK_CHARACTERS = BLOCK
    job, plan, folder, one = run
    whole = folder / "whole"
    start = whole / f"{STOP}.ckpt"
    losses = {"whole": fit(job, plan, whole, Plant("shard", (1,)), stops=(STOP,))}
    losses["rest"] = fit(job, plan, folder / "rest", start=start)
    if one is not None:
        losses["from one"] = fit(job, plan, folder / "from-one", start=one)
        spike = Plant("loss", (STEPS - 1,), factor=3.0)
        losses["spiked"] = fit(job, plan, folder / "spiked", spike, start=start)
    return losses
