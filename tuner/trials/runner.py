"""Short runs of plans, and the paired difference between the results of two plans."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from foam_lightning.data.module import TextData
from foam_lightning.data.own import OwnData
from foam_lightning.job import Job
from foam_lightning.memory.device import memory_shortage_context
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, MemoryOptions

# Standard deviation between seeds of the paired difference of two plans, in nats per token, as
# first measured (docs/log.md). An interval over evaluation batches alone does not include it.
SEED_DEVIATION = 0.01
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class TrialResult:
    """The result of a short run: its loss on every evaluation batch.

    Attributes:
        nats: Summed negative log-likelihood by evaluation batch.
        num_tokens: Scored tokens by evaluation batch.
        curve: Training loss by optimizer step, in nats per token; runs of one seed see the same
            batches, so curves pair step by step. Empty where it was not saved.
    """

    nats: Sequence[float]
    num_tokens: Sequence[int]
    curve: Sequence[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats; NaN if the run diverged."""
        return math.fsum(self.nats) / sum(self.num_tokens)


@dataclass(frozen=True)
class Difference:
    """Loss of one plan minus that of another, in nats per token, with its 95 % interval.

    As text it has the two significant digits of the interval: "-0.052 ± 0.026".

    Attributes:
        mean: Below zero, the first plan is better.
        half_width: Half of the width of the interval.
    """

    mean: float
    half_width: float

    @property
    def is_decided(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.mean) > self.half_width

    @property
    def size(self) -> str:
        """The text without its sign, for sentences that say "lower" or "higher"."""
        return str(self)[1:]

    def __str__(self) -> str:
        _, _, exponent = f"{self.half_width:.1e}".partition("e")  # of the rounded half-width
        digits = max(0, 1 - int(exponent or 0))
        return f"{self.mean:+.{digits}f} ± {self.half_width:.{digits}f}"


def paired_difference(runs: Sequence[TrialResult], others: Sequence[TrialResult]) -> Difference:
    """Compare two plans on the same seeds and evaluation batches.

    The variance of the mean is that of the batches, which pairing makes small, plus that of the
    seeds, over the number of seeds. The latter is `SEED_DEVIATION ** 2`, since there are too few
    runs to estimate it. A bootstrap over batches and such seeds has the same interval.

    Runs with other micro-batches are evaluated on the same rows in other batches; they are compared
    on the smallest groups of batches that have the same rows in both.

    Args:
        runs: The first plan's runs, one per seed.
        others: The runs of the other plan, same seeds in the same order.

    Raises:
        ValueError: The runs do not pair.
    """
    if len(runs) != len(others) or not runs:
        raise ValueError(f"{len(runs)} runs do not pair with {len(others)}")
    means, variance = [], SEED_DEVIATION**2
    for run, other in zip(runs, others, strict=True):
        tokens, gaps = _gaps(run, other)
        mean = float(gaps.sum() / tokens.sum())
        means.append(mean)
        if len(tokens) > 1:
            deviations = (gaps - mean * tokens) / tokens.mean()
            variance += float(deviations.var() / len(tokens)) / len(runs)
    return Difference(
        mean=math.fsum(means) / len(means),
        half_width=_NORMAL_95 * math.sqrt(variance / len(runs)),
    )


def _gaps(run: TrialResult, other: TrialResult) -> tuple[Tensor, Tensor]:
    """Return the tokens of each group of batches with the same rows, and the difference in nats."""
    ends, other_ends = (torch.tensor(r.num_tokens).cumsum(0) for r in (run, other))
    shared = ends[torch.isin(ends, other_ends)]
    if not len(shared) or shared[-1] != ends[-1] or shared[-1] != other_ends[-1]:
        raise ValueError("the runs were evaluated on different batches")
    nats, other_nats = (
        torch.tensor(r.nats, dtype=torch.float64).cumsum(0)[torch.searchsorted(of_run, shared)]
        for r, of_run in ((run, ends), (other, other_ends))
    )
    zero = torch.zeros(1)
    return shared.double().diff(prepend=zero), (nats - other_nats).diff(prepend=zero)


class TrialRunner:
    """Short runs of the plans of one job that differ in nothing but the plan.

    All runs of a seed start from the same weights and see the same batches. The schedule of a run
    is complete, warm-up and decay included, since a truncated schedule ranks plans wrongly
    (docs/log.md).

    Args:
        job: What to train.
        on_step: Called after every optimizer step.
        memory_options: Replaces the memory options of every plan after memory ran out; they change
            the loss only by rounding.
    """

    def __init__(
        self,
        job: Job,
        on_step: Callable[[], None] = lambda: None,
        *,
        memory_options: MemoryOptions | None = None,
    ) -> None:
        self.job = job
        self._on_step = on_step
        self._memory_options = memory_options
        self._data: dict[int, TextData | OwnData] = {}

    def run(
        self, plan: FoldPlan, *, num_steps: int, seed: int, callbacks: Sequence[Callback] = ()
    ) -> TrialResult:
        """Train for `num_steps` and evaluate.

        Args:
            plan: The plan; all plans of a comparison have the same memory options.
            num_steps: Optimizer steps.
            seed: Seed of the weights and of the order of the data.
            callbacks: Callbacks of the trainer.

        Raises:
            MemoryShortageError: The device has not enough memory.
        """
        recorder = _Recorder(self._on_step)
        with self._trained(plan, num_steps, seed, [recorder, *callbacks]) as (trainer, module):
            trainer.limit_val_batches = 1.0
            trainer.validate(module, datamodule=self._data[seed], verbose=False)
        return TrialResult(recorder.nats, recorder.num_tokens, recorder.curve())

    def seconds_per_step(self, plan: FoldPlan) -> float:
        """Measure the time of an optimizer step: the mean of the second and the third.

        Raises:
            MemoryShortageError: The device has not enough memory.
        """
        clock = StepClock()
        self.train(plan, num_steps=3, callbacks=[clock])
        return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)

    def train(self, plan: FoldPlan, *, num_steps: int, callbacks: Sequence[Callback]) -> None:
        """Train for a few steps, without evaluation, for the sake of the callbacks.

        Raises:
            MemoryShortageError: The device has not enough memory.
        """
        with self._trained(plan, num_steps, self.job.seed, callbacks):
            pass

    @contextmanager
    def _trained(
        self, plan: FoldPlan, num_steps: int, seed: int, callbacks: Sequence[Callback]
    ) -> Iterator[tuple[Trainer, LlamaFoam]]:
        plan = replace(plan, memory_options=self._memory_options or plan.memory_options)
        module = self.job.new_module(seed=seed)
        module.set_plan(plan)
        if seed not in self._data:
            self._data[seed] = self.job.new_data(plan.memory_options, seed=seed)
        trainer = self.job.new_trainer(
            plan.memory_options,
            callbacks,
            bare=True,
            max_steps=num_steps,
            limit_val_batches=0,
            val_check_interval=None,
        )
        with memory_shortage_context("a short run of the search", plan, trainer):
            trainer.fit(module, datamodule=self._data[seed])
            yield trainer, module


class StepClock(Callback):
    """Records when each optimizer step ends, in `times`, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        if trainer.global_step > len(self.times):
            float(outputs["loss"])  # waits until the GPU has finished the step
            self.times.append(time.monotonic())


class _Recorder(Callback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self.nats: list[float] = []
        self.num_tokens: list[int] = []
        # By optimizer step, on the device: reading a value would make the CPU wait for it.
        self._losses: list[Tensor] = []
        self._step = 1  # in progress, from 1
        self._on_step = on_step

    def curve(self) -> list[float]:
        """Return the training loss by optimizer step."""
        return torch.stack(self._losses).tolist() if self._losses else []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = outputs["loss"].detach().float()  # divided by the number of micro-batches
        if len(self._losses) < self._step:
            self._losses.append(loss)
        else:
            self._losses[-1] = self._losses[-1] + loss
        if trainer.global_step == self._step:
            self._step += 1
            self._on_step()

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.nats.append(float(outputs["nll"]))
        self.num_tokens.append(int(outputs["num_tokens"]))
