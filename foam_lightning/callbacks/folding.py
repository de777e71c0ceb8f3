"""Show how much of the gradient folding leaves to the residual."""

from collections import defaultdict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from foam_lightning.module import LlamaFoam
from foam_lightning.optim.fold import fold, unfold
from foam_lightning.roles import role_of
from foam_lightning.sharding import local

# All gradients are alive here, which may be the peak of the step: a matrix is looked at some rows
# at a time, so that what this adds stays below 5 MB.
_PART_ELEMENTS = 2**18


class ResidualEnergy(Callback):
    """Log ||gradient - unfold(fold(gradient))|| / ||gradient|| per role.

    Columns that share nothing give sqrt(1 - 2**-level); less means that neighbours agree.

    Args:
        every_n_steps: Optimizer steps between two measurements.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self._every_n_steps = every_n_steps

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step % self._every_n_steps or not isinstance(pl_module, LlamaFoam):
            return
        plan = pl_module.plan
        squares = defaultdict[str, list[float]](lambda: [0.0, 0.0])
        for name, parameter in pl_module.model.named_parameters() if pl_module.model else ():
            level = plan.levels.get(name, 0) if plan else 0
            if level == 0 or parameter.grad is None:
                continue
            num_rows = max(1, _PART_ELEMENTS // parameter.shape[-1])
            for rows in local(parameter.grad).split(num_rows):
                grad = rows.float()
                residual = grad - unfold(fold(grad, level), level, grad.shape[-1])
                squares[role_of(name)][0] += float(residual.square().sum())
                squares[role_of(name)][1] += float(grad.square().sum())
        # Every rank has its rows of a sharded gradient, or the whole: then all count as often.
        sums = torch.tensor(list(squares.values()), dtype=torch.float64, device=pl_module.device)
        totals = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        for role, (of_residual, of_grad) in zip(squares, totals, strict=True):
            if of_grad:
                pl_module.log(f"folding/residual_{role}", (of_residual / of_grad) ** 0.5)
