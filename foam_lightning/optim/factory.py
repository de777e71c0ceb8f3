"""The optimizer of a run, as its settings and its plan ask for it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from foam_lightning.errors import ConfigError
from foam_lightning.optim.baselines import Settings, new_baseline
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.groups import param_groups
from foam_lightning.plan import FoldPlan
from foam_lightning.validation import MODEL, check_pattern, check_ranges


def check_settings(model: Mapping[str, Any]) -> None:
    """Refuse settings that are out of range, or contradict each other.

    Args:
        model: The arguments of `LlamaFoam`.

    Raises:
        ConfigError: They do.
    """
    check_ranges("model.", model, MODEL)
    check_pattern("model.exclude", model["exclude"])
    optimizer, clip_norm = model["optimizer"], model["clip_norm"]
    if optimizer != "foam" and (model["gradient_release"] or model["state_offload"] or clip_norm):
        raise ConfigError(
            f"model.optimizer {optimizer} goes without model.gradient_release, "
            "model.state_offload and model.clip_norm, which are FOAM's; leave them out"
        )


def new_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    plan: FoldPlan,
    model: Mapping[str, Any],
    *,
    hidden_size: int,
    num_heads: int,
) -> Optimizer:
    """Make FOAM for a plan's levels, or a baseline, which takes the plan's learning rate alone.

    Args:
        named_parameters: As from `model.named_parameters()`; frozen ones are left out.
        plan: Levels, scales, learning rate and memory options.
        model: The arguments of `LlamaFoam`.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.

    Raises:
        ConfigError: The optimizer is unknown, or its package is missing.
    """
    shared = {
        "lr": plan.lr,
        "betas": tuple(model["betas"]),
        "eps": model["eps"],
        "weight_decay": model["weight_decay"],
    }
    if model["optimizer"] != "foam":
        settings = Settings(
            **shared,
            matrix_scale=model["unfolded_scale"],
            exclude=model["exclude"],
            hidden_size=hidden_size,
            num_heads=num_heads,
        )
        return new_baseline(model["optimizer"], named_parameters, settings)
    return FOAM(
        param_groups(named_parameters, plan.levels, plan.scales, shared.pop("weight_decay")),
        **shared,
        residual_scale=model["residual_scale"],
        second_moment=model["second_moment"],
        bias_correct_moments_only=model["bias_correct_moments_only"],
        state_dtype=getattr(torch, plan.memory_options.state_dtype),
        clip_norm=model["clip_norm"],
        stochastic_rounding=model["stochastic_rounding"],
        state_offload=plan.memory_options.state_offload,
    )
