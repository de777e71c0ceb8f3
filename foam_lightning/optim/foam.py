"""The FOAM optimizer: AdamW with moments folded along the columns of each matrix."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from foam_lightning.optim.checkpoint import check_fit, restore_
from foam_lightning.optim.dispatch import update_
from foam_lightning.optim.fold import check_level
from foam_lightning.optim.functional import StepFactors
from foam_lightning.optim.offload import HostState, pinned_memory, state_on_device
from foam_lightning.optim.state import STATE_DTYPES, SecondMoment, layouts

# Options that say how the state is kept and computed: never taken from a checkpoint.
_OF_THE_RUN = ("state_dtype", "state_offload", "fused")


class FOAM(torch.optim.Optimizer):
    """AdamW that keeps the mean of each block of 2**level columns instead of every moment.

    What a block mean loses of the gradient, the residual, re-enters the update of the same step and
    is never stored. Source: FOAM (Wen et al. 2025, arXiv:2512.07112). Where sources disagree:

    - The second moment is the mean of squares, as in the released code; the square of the mean, as
      in the paper, is `second_moment="square_mean"`.
    - A ragged last block is the mean over the columns that exist.
    - A block wider than the matrix is the whole row, the limit of every level.
    - eps is added after bias correction, weight decay acts before the update, as in
      torch.optim.AdamW. Level 0 with scale 1 is torch.optim.AdamW, in float32 to the last bit.
    - The bias correction is of the whole step, residual included; `bias_correct_moments_only`
      leaves the residual out.
    - Tensors with fewer than two dimensions are never folded and take scale 1. Which matrices fold
      is for the parameter groups to say: see `foam_lightning.optim.groups`.
    - The moments have the dtype that `state_dtype` says, whatever the dtype of the gradient.

    State of each parameter: `step` (int), `exp_avg` and `exp_avg_sq`, both of shape
    `folded_shape(parameter.shape, level)`, and with int8 their scales; see
    `foam_lightning.optim.state`. Any argument but `params` may be set by group.

    A gradient that is not finite makes its block of weights and moments not finite, and no other,
    as in torch.optim.AdamW. A sharded parameter (a DTensor) is updated shard by shard, without
    communication: rows may be sharded, folded columns may not.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either. With names, messages
            about checkpoints name the parameter.
        lr: Learning rate, 0 or more.
        betas: Decay of the first and of the second moment, each in [0, 1).
        eps: Added to the root of the second moment, 0 or more.
        weight_decay: Decoupled weight decay, 0 or more. `scale` does not act on it.
        level: Fold level, 0 or more: 2**level columns share one moment.
        scale: Factor of lr in the update of matrices, 0 or more. Its best value depends on level.
        residual_scale: Weight of the residual, 0 or more.
        second_moment: "mean_square" or "square_mean"; "row" is a folded Adam-mini, one second
            moment for each row; "none" is Muon with a folded momentum. Tensors with fewer than
            two dimensions always have Adam's.
        state_dtype: torch.float32, torch.bfloat16 or torch.int8 (with scales, 1.02 bytes a value).
        bias_correct_moments_only: Leave the residual out of the bias correction.
        clip_norm: If set, each gradient is scaled down to at most this L2 norm, by itself.
        stochastic_rounding: Round bfloat16 weights, and moments in bfloat16 or int8, at random
            with the right mean. To the nearest, updates below 1/512 of a weight are lost.
        fused: Update in one pass over memory where there is a way: in float32 on the CPU by a
            kernel that is compiled once (a C++ compiler must be there), on a GPU by
            torch.compile. It differs from the plain update in the last bits.
        state_offload: Keep the moments in host memory, pinned beside CUDA; those of one parameter
            at a time visit the device for its update. Costs 2 x the state's bytes over the bus a
            step, and changes no bit; see `host`. On the CPU there is nothing to move.

    Raises:
        ValueError: An argument, or an entry of a group, is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        level: int = 2,
        scale: float = 0.25,
        residual_scale: float = 1.0,
        second_moment: SecondMoment = "mean_square",
        state_dtype: torch.dtype = torch.float32,
        bias_correct_moments_only: bool = False,
        clip_norm: float | None = None,
        stochastic_rounding: bool = True,
        fused: bool = True,
        state_offload: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "level": level,
            "scale": scale,
            "residual_scale": residual_scale,
            "second_moment": second_moment,
            "state_dtype": state_dtype,
            "bias_correct_moments_only": bias_correct_moments_only,
            "clip_norm": clip_norm,
            "stochastic_rounding": stochastic_rounding,
            "fused": fused,
            "state_offload": state_offload,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults for what it does not set.

        Raises:
            ValueError: An entry is out of range.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, one at a time.

        Args:
            closure: Computes the loss and the gradients; run with gradients enabled.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Give the state as every torch optimizer does, wherever the moments live.

        How they are kept and computed is not in it: that is for each run to say.
        """
        found = super().state_dict()
        # Plain, because a file that holds a class of ours does not load with `weights_only`, and
        # ranks that share a state put nothing but numbers, texts and tensors together.
        return {
            "state": {key: dict(state) for key, state in found["state"].items()},
            "param_groups": [
                {key: value for key, value in group.items() if key not in _OF_THE_RUN}
                for group in found["param_groups"]
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, in the `state_dtype` of this optimizer's groups and where they keep it.

        Options that may change during a run (lr, scale, ...) come from `state_dict`, as in every
        torch optimizer. The fold levels and `second_moment` give the state its meaning, so they
        must be equal.

        Args:
            state_dict: From `state_dict()` of a FOAM with the same parameters in the same groups.

        Raises:
            CheckpointError: The state does not fit; the message names the first parameter that
                differs, or gives its number where names are not known.
        """
        check_fit(self.param_groups, state_dict)
        # How the state is kept and computed is for the run to say; what an older version did not
        # save takes the run's value too.
        saved_groups = [
            {**group, **saved, **{key: group[key] for key in _OF_THE_RUN}}
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        # torch would cast the moments to the dtype of the parameter, so it is not given them.
        super().load_state_dict({**state_dict, "param_groups": saved_groups, "state": {}})
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    self.state[param] = _fresh_state(param, group)
                    restore_(self.state[param], state_dict["state"][key])

    def update(self, param: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter from its gradient; what `step` does for each, one after the other.

        Args:
            param: A parameter of `group` that has a gradient.
            group: The entry of `param_groups` that holds it.

        Raises:
            RuntimeError: There is no gradient, or it is sparse or complex.
        """
        grad = param.grad
        if grad is None or grad.layout != torch.strided or grad.is_complex():
            kind = "no" if grad is None else "a complex" if grad.is_complex() else "a sparse"
            raise RuntimeError(
                f"FOAM needs a dense real gradient, got {kind} one for a parameter of shape "
                f"{tuple(param.shape)}"
            )
        if param.numel() == 0:
            return
        is_matrix = param.ndim >= 2
        if not self.state[param]:
            self.state[param] = _fresh_state(param, group)
        state = self.state[param]
        state["step"] += 1
        if group["clip_norm"] is not None:
            norm = _whole(torch.linalg.vector_norm(grad, dtype=torch.float32))
            grad = grad * (group["clip_norm"] / norm.clamp_min(group["clip_norm"])).to(grad.dtype)
        beta1, beta2 = group["betas"]
        factors = StepFactors.at(
            state["step"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            scale=group["scale"] if is_matrix else 1.0,
            residual_scale=group["residual_scale"],
            bias_correct_moments_only=group["bias_correct_moments_only"],
        )
        moments = {key: _local(value) for key, value in state.items() if key != "step"}
        offload = group["state_offload"]
        with state_on_device(moments, param.device) if offload else nullcontext(moments) as lent:
            update_(
                _local(param.detach()),
                _local(grad),
                lent,
                factors,
                seed=state["step"] if group["stochastic_rounding"] else None,
                fused=group["fused"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                level=group["level"] if is_matrix else 0,
                second_moment=group["second_moment"],
            )


def _fresh_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Make the state of a parameter before its first step, where its group keeps it."""
    state = {"step": 0, **_zeros(param, group)}
    return HostState(state) if group["state_offload"] else state


def _zeros(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Allocate the moments of a parameter, sharded as it is."""
    level = group["level"]
    if (
        level > 0
        and param.ndim >= 2
        and any(p.is_shard(param.ndim - 1) for p in getattr(param, "placements", ()))
    ):
        raise RuntimeError(
            f"the columns of a parameter of shape {tuple(param.shape)} are sharded, so they cannot "
            "fold; shard its rows (dimension 0), as FSDP2 does, or set level 0"
        )
    found = layouts(param.shape, level, group["state_dtype"], group["second_moment"])
    where = pinned_memory(param) if group["state_offload"] else {}
    return {
        # Like a slice of the parameter, because a shape alone would not be sharded.
        key: torch.zeros_like(
            param.detach() if param.shape == shape else param.detach().narrow(-1, 0, shape[-1]),
            dtype=dtype,
            **where,
        )
        for key, (shape, dtype) in found.items()
    }


def _local(tensor: Tensor) -> Tensor:
    """Give the shard of a DTensor that this process has, any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    """Gather a DTensor, give any other tensor as it is."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "scale", "residual_scale"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be a number of 0 or more, got {options[name]}")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers of 0 or more and below 1, got {betas}")
    check_level(options["level"])
    clip_norm = options["clip_norm"]
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be a number above 0 or None, got {clip_norm}")
    if options["second_moment"] not in get_args(SecondMoment):
        raise ValueError(
            f"second_moment must be one of {', '.join(get_args(SecondMoment))}, "
            f"got {options['second_moment']!r}"
        )
    if options["state_dtype"] not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, "
            f"got {options['state_dtype']}"
        )
