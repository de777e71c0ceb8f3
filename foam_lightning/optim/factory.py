"""Create the optimizer that settings and fold plan ask for."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from foam_lightning.optim.baselines import BaselineSettings, create_baseline
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.groups import param_groups
from foam_lightning.plan import FoldPlan
from foam_lightning.settings import ModelSettings


def create_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    plan: FoldPlan,
    model: ModelSettings,
    *,
    hidden_size: int,
    num_heads: int,
) -> Optimizer:
    """Create FOAM with a plan's levels, or a baseline, which uses only the plan's learning rate.

    Args:
        named_parameters: As from `model.named_parameters()`; frozen ones are left out.
        plan: Levels, scales, learning rate and memory options.
        model: The settings of the optimizer.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.

    Raises:
        ConfigError: The optimizer is unknown, or its package is missing.
    """
    if model.optimizer != "foam":
        settings = BaselineSettings(
            lr=plan.lr,
            betas=model.betas,
            eps=model.eps,
            weight_decay=model.weight_decay,
            matrix_scale=model.unfolded_scale,
            exclude=model.exclude,
            hidden_size=hidden_size,
            num_heads=num_heads,
        )
        return create_baseline(model.optimizer, named_parameters, settings)
    return FOAM(
        param_groups(named_parameters, plan.levels, plan.scales, model.weight_decay),
        lr=plan.lr,
        betas=model.betas,
        eps=model.eps,
        residual_scale=model.residual_scale,
        second_moment=model.second_moment,
        bias_correct_moments_only=model.bias_correct_moments_only,
        state_dtype=getattr(torch, plan.memory_options.state_dtype),
        clip_norm=model.clip_norm,
        stochastic_rounding=model.stochastic_rounding,
        state_offload=plan.memory_options.state_offload,
    )
