"""Tokens per second, FLOP/s and model FLOPs utilization (MFU) of a run."""

import math
import time
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from foam_lightning.model.roles import role_of
from foam_lightning.module import LlamaFoam


def flops_per_token(shapes: Mapping[str, tuple[int, ...]], sequence_length: int) -> int:
    """Count the operations that training needs for one token, forward and backward.

    6 N + 12 L H Q T of PaLM (Chowdhery et al., arXiv 2204.02311), appendix B: two operations for
    every weight and three passes; and of every layer's H heads of size Q the products of queries
    and keys, and of weights and values, over the whole row. What activation checkpointing computes
    twice does not count: the model has no use for it. A departure: N leaves out the embedding,
    where it is only looked up, and norms.

    Args:
        shapes: Of every parameter, by qualified name.
        sequence_length: Tokens in a row, T.
    """
    has_head = any("lm_head" in name for name in shapes)  # a tied one is the embedding itself
    num_weights = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) > 1 and not (has_head and "embed_tokens" in name)
    )
    heads = sum(shape[0] for name, shape in shapes.items() if _makes_queries(name, shape))
    return 6 * num_weights + 12 * heads * sequence_length


def _makes_queries(name: str, shape: tuple[int, ...]) -> bool:
    return role_of(name) == "q" and len(shape) > 1  # not its bias


def peak_flops(device: torch.device, precision: str) -> int | None:
    """Look up what a device could compute, in operations a second.

    The figures are Lightning's and no better than that: from data sheets, for consumer cards
    without tensor cores, for few with sparsity.

    Args:
        device: The device of this process.
        precision: Lightning's name of the precision.

    Returns:
        None for a CPU and for a card that Lightning does not know.
    """
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a card is unknown is an answer
        return get_available_flops(device, dtype)


# What is shown is the mean over so many steps: one alone jumps, all together hide a change.
_STEPS_SHOWN = 20


class _Work(NamedTuple):
    """What was done, by all devices together."""

    seconds: float = 0.0
    tokens: int = 0
    flops: int = 0

    def plus(self, other: "_Work") -> "_Work":
        return _Work(
            self.seconds + other.seconds, self.tokens + other.tokens, self.flops + other.flops
        )


class Throughput(Callback):
    """Log how fast training is, evaluation left out: tokens, steps and model operations.

    The clock runs from the end of one batch to the end of the next, so that waiting for data
    counts, and on a GPU the work that outlives the call that started it. The figures are means
    over the last 20 optimizer steps. Model FLOPs utilisation (`throughput/mfu`) is the share of
    what all devices could compute, and is logged where that is known.

    Attributes:
        tokens_per_second: Over the whole run so far; None before the first step.
        step_seconds: Seconds of an optimizer step, over the last ones; None before the first.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self.step_seconds: float | None = None
        self._total = _Work()
        self._step = _Work()  # the one under way
        self._steps: deque[_Work] = deque(maxlen=_STEPS_SHOWN)
        self._last_step = 0
        self._since = 0.0
        self._peak: int | None = None
        self._flops_per_token: dict[int, int] = {}  # by the length of a row

    @property
    def tags(self) -> list[str]:
        """Name the curves that the run gets; known once its device is."""
        names = ["tokens_per_second", "step_seconds", "model_flops_per_second"]
        return [f"throughput/{name}" for name in (*names, *(["mfu"] if self._peak else []))]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = peak_flops(pl_module.device, str(trainer.precision))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self._since = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        num_tokens = batch["input_ids"].numel() * trainer.world_size
        length = batch["input_ids"].shape[-1]
        done = _Work(now - self._since, num_tokens, num_tokens * self._flops(pl_module, length))
        self._since = now
        self._total = self._total.plus(done)
        self.tokens_per_second = self._total.tokens / self._total.seconds
        self._step = self._step.plus(done)
        if trainer.global_step == self._last_step:  # micro-batches of the step are still to come
            return
        self._last_step = trainer.global_step
        self._steps.append(self._step)
        self._step = _Work()
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        shown = _Work()
        for step in self._steps:
            shown = shown.plus(step)
        self.step_seconds = shown.seconds / len(self._steps)
        flops_per_second = shown.flops / shown.seconds
        module.log("throughput/tokens_per_second", shown.tokens / shown.seconds)
        module.log("throughput/step_seconds", self.step_seconds)
        module.log("throughput/model_flops_per_second", flops_per_second)
        if self._peak:
            module.log("throughput/mfu", flops_per_second / (self._peak * trainer.world_size))

    def _flops(self, module: LightningModule, length: int) -> int:
        assert isinstance(module, LlamaFoam)
        if length not in self._flops_per_token:
            self._flops_per_token[length] = flops_per_token(module.shapes, length)
        return self._flops_per_token[length]
