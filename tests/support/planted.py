"""A callback that spoils the loss, a gradient or the rows of chosen steps."""

import math
from collections.abc import Collection
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from foam_lightning.distributed.fsdp import local_shard
from foam_lightning.module import LlamaFoam


class Plant(Callback):
    """Spoil steps.

    Args:
        what: "loss" multiplies the loss, "gradient" makes one gradient inf, "rows" makes labels
            nonsense, "shard" makes one gradient inf on the last rank, after averaging.
        steps: The values of `global_step` at which to spoil.
        factor: Multiplies a loss.
        micro_batch: The micro-batch of a step to spoil, from 0; rows are spoiled in all.
    """

    def __init__(
        self, what: str, steps: Collection[int], *, factor: float = math.nan, micro_batch: int = 0
    ) -> None:
        self.factor = factor
        self.what = what
        self.steps = steps
        self.micro_batch = micro_batch
        self._undo: Any = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LlamaFoam, batch: Any, batch_idx: int
    ) -> None:
        is_here = batch_idx % trainer.accumulate_grad_batches == self.micro_batch
        is_here = is_here or self.what == "rows"
        if trainer.global_step not in self.steps or not is_here:
            return
        if self.what == "loss":
            summed: Any = pl_module._summed_loss

            def spoiled(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
                total, num_tokens = summed(*arguments)
                return total * self.factor, num_tokens

            pl_module._summed_loss = spoiled  # type: ignore[method-assign]
            self._undo = lambda: pl_module.__dict__.pop("_summed_loss")
        elif self.what == "gradient":
            assert pl_module.model is not None
            weight = pl_module.model.model.layers[1].mlp.up_proj.weight
            self._undo = weight.register_hook(lambda grad: grad + math.inf).remove
        elif self.what == "rows":
            batch["labels"].copy_((batch["labels"] * 7 + 131) % 300)

    def on_train_batch_end(self, *_: Any) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LlamaFoam, _: Any) -> None:
        is_last = trainer.global_rank == trainer.world_size - 1
        if self.what == "shard" and trainer.global_step in self.steps and is_last:
            grad = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            local_shard(grad)[0] = math.inf
