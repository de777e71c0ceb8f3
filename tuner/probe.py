"""The probe: what one run of Adam tells about every role and level at once."""

import math
from collections import defaultdict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from foam_lightning.memory.levers import MAX_LEVEL
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.fold import fold
from foam_lightning.optim.state import read
from foam_lightning.optim.step import foam_direction
from foam_lightning.roles import role_of

LEVELS = tuple(range(MAX_LEVEL + 1))


class UpdateProbe(Callback):
    """Measure the RMS of the update that FOAM would take, per role and level, during an Adam run.

    Folding is linear: Adam's moments, folded, are FOAM's (FOAM, arXiv:2512.07112, with the mean
    of squares). So one run shows the update of every level, with no state beside Adam's.

    Args:
        at_step: The optimizer step to look at, counted from 0.

    Attributes:
        rms: Root mean square of the unscaled update, by role and level; empty before that step,
            for other second moments, which are not linear, and where gradients are released.
    """

    def __init__(self, at_step: int) -> None:
        self.rms: dict[str, dict[int, float]] = {}
        self._at_step = at_step

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step != self._at_step or not isinstance(pl_module, LlamaFoam):
            return
        squares = defaultdict[str, dict[int, float]](lambda: dict.fromkeys(LEVELS, 0.0))
        counts = defaultdict[str, int](int)
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                state = optimizer.state.get(parameter)
                if name not in pl_module.foldable or not state or parameter.grad is None:
                    continue
                if group["second_moment"] != "mean_square":
                    return
                beta1, beta2 = group["betas"]
                grad = parameter.grad.float()
                if (limit := group["clip_norm"]) is not None:  # as the optimizer will
                    grad = grad * (limit / torch.linalg.vector_norm(grad).clamp_min(limit))
                # The state may live in host memory.
                mean = read(state, "exp_avg").to(grad.device).lerp(grad, 1 - beta1)
                square = read(state, "exp_avg_sq").to(grad.device).lerp(grad.square(), 1 - beta2)
                role = role_of(name)
                counts[role] += grad.numel()
                for level in LEVELS:
                    direction = foam_direction(
                        grad,
                        fold(mean, level),
                        fold(square, level),
                        step=state["step"] + 1,
                        beta1=beta1,
                        beta2=beta2,
                        eps=group["eps"],
                        level=level,
                        residual_scale=group["residual_scale"],
                        bias_correct_moments_only=group["bias_correct_moments_only"],
                    )
                    squares[role][level] += float(direction.square().sum())
        self.rms = {
            role: {level: math.sqrt(total / counts[role]) for level, total in by_level.items()}
            for role, by_level in squares.items()
        }
