"""Log how much of the gradient folding leaves to the residual."""

from collections import defaultdict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from foam_lightning.distributed.fsdp import local_shard
from foam_lightning.model.roles import role_of
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.fold import fold, unfold

# All gradients exist here, which may be the peak of the step. A matrix is read some rows at a time,
# so that this adds less than 5 MB.
_PART_ELEMENTS = 2**18
_EVERY_N_LOGS = 5


class ResidualEnergy(Callback):
    """Log the share of the gradient's energy that is in the residual, per role.

    That is ||gradient - unfold(fold(gradient))||**2 / ||gradient||**2 over all folded matrices of a
    role. Independent columns give 1 - 2**-level; less means that neighbouring columns agree.

    It costs about ten passes over the gradients of these matrices, like a plain FOAM update, at
    every fifth logging step: one more update in 50 with `trainer.log_every_n_steps` 10. With
    gradient release there are no gradients to read.
    """

    @staticmethod
    def applies_to(module: LlamaFoam) -> bool:
        """Return whether the optimizer folds and gradients exist after the backward pass."""
        plan = module.plan
        if plan is None or module.settings.optimizer != "foam":
            return False
        return any(plan.levels.values()) and not plan.memory_options.gradient_release

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        every = _EVERY_N_LOGS * max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        assert isinstance(pl_module, LlamaFoam)
        if trainer.global_step % every or not self.applies_to(pl_module):
            return
        assert pl_module.model is not None
        assert pl_module.plan is not None
        sums = defaultdict[str, Tensor](lambda: torch.zeros(2, device=pl_module.device))
        for name, parameter in pl_module.model.named_parameters():
            level = pl_module.plan.levels.get(name, 0)
            if level == 0 or parameter.grad is None:
                continue
            num_rows = max(1, _PART_ELEMENTS // parameter.shape[-1])
            for rows in local_shard(parameter.grad).split(num_rows):
                grad = rows.float()
                residual = grad - unfold(fold(grad, level), level, grad.shape[-1])
                sums[role_of(name)] += torch.stack([residual.square().sum(), grad.square().sum()])
        if not sums:
            return
        # Ranks have their rows of a sharded gradient, or the same whole one, which cancels.
        stacked = torch.stack(list(sums.values()))
        totals = trainer.strategy.reduce(stacked, reduce_op="sum").tolist()
        shares = {
            f"folding/residual_energy_{role}": of_residual / of_grad
            for role, (of_residual, of_grad) in zip(sums, totals, strict=True)
            if of_grad
        }
        # Not by Lightning's `log`, which would repeat the values at every logging step.
        for logger in trainer.loggers:
            logger.log_metrics(shares, step=trainer.global_step)
