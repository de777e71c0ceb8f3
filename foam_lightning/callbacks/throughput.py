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
from typing_extensions import override

from foam_lightning.model.roles import role_of
from foam_lightning.module import LlamaFoam


def flops_per_token(shapes: Mapping[str, tuple[int, ...]], sequence_length: int) -> int:
    """Count the FLOPs that training needs for one token, forward and backward.

    6 N + 12 L H Q T of PaLM (Chowdhery et al., arXiv:2204.02311), appendix B: two FLOPs per weight
    in three passes, and in each of the L layers the products of queries with keys and of attention
    with values, for H heads of size Q over T tokens. Recomputation by activation checkpointing does
    not count. One departure: N excludes norms, and the embedding unless it is also the head.

    Args:
        shapes: The shape of every parameter, by qualified name.
        sequence_length: T, tokens in a row.
    """
    has_head = any("lm_head" in name for name in shapes)  # a tied one is the embedding itself
    num_weights = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) > 1 and not (has_head and "embed_tokens" in name)
    )
    # The heads of a layer together are as wide as the input of its output matrix.
    outputs = [shape for name, shape in shapes.items() if role_of(name) == "o" and len(shape) > 1]
    return 6 * num_weights + 12 * sum(shape[1] for shape in outputs) * sequence_length


def peak_flops(device: torch.device, precision: str) -> int | None:
    """Look up the peak FLOP/s of a device.

    The numbers are Lightning's, from data sheets: for consumer cards without tensor cores, for a
    few cards with sparsity.

    Args:
        device: The device of this process.
        precision: Lightning's name of the precision.

    Returns:
        None for a CPU, and for a card that Lightning does not list.
    """
    names = {"bf16": torch.bfloat16, "16": torch.float16}
    dtype = names.get(precision.partition("-")[0], torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an unknown card
        return get_available_flops(device, dtype)


# Logged values are means over this many steps: one step alone is noisy, all hide a change.
_STEPS_SHOWN = 20


class _Work(NamedTuple):
    """Work done by all devices together."""

    seconds: float = 0.0
    tokens: int = 0
    flops: int = 0

    @classmethod
    def sum_of(cls, *works: "_Work") -> "_Work":
        return cls(*map(sum, zip(*works, strict=True)))


class Throughput(Callback):
    """Log the speed of training without evaluation: tokens, step time and model FLOP/s.

    Time runs from the end of one batch to the end of the next, so it includes waiting for data and
    asynchronous work of a GPU. Values are means over the last 20 optimizer steps. Model FLOPs
    utilization (`throughput/mfu`), the share of the peak FLOP/s of all devices, is logged if that
    peak is known.

    Attributes:
        tokens_per_second: Over the whole run so far; None before the first step.
        step_seconds: The mean time of the last 20 optimizer steps; None before the first.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self.step_seconds: float | None = None
        self._total = _Work()
        self._step = _Work()  # the current one
        self._steps: deque[_Work] = deque(maxlen=_STEPS_SHOWN)
        self._last_step = 0
        self._since = 0.0
        self._peak: int | None = None
        self._flops_per_token: dict[int, int] = {}  # by sequence length

    @property
    def tags(self) -> list[str]:
        """Return the tags of the run's curves; complete from `on_fit_start` on."""
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
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        num_tokens = batch["input_ids"].numel() * trainer.world_size
        length = batch["input_ids"].shape[-1]
        done = _Work(now - self._since, num_tokens, num_tokens * self._flops(pl_module, length))
        self._since = now
        self._total = _Work.sum_of(self._total, done)
        self.tokens_per_second = self._total.tokens / self._total.seconds
        self._step = _Work.sum_of(self._step, done)
        if trainer.global_step == self._last_step:  # more micro-batches follow
            return
        self._last_step = trainer.global_step
        self._steps.append(self._step)
        self._step = _Work()
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        shown = _Work.sum_of(*self._steps)
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
