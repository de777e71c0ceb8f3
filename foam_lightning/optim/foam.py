"""The FOAM optimizer: AdamW with moments folded along the columns of each matrix."""

import math
from collections.abc import Callable, Iterator
from typing import Any, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from foam_lightning.optim.checkpoint import check_fit, restore
from foam_lightning.optim.fold import check_level, folded_shape
from foam_lightning.optim.step import SecondMoment, foam_step_

_STATE_DTYPES = (torch.float32, torch.bfloat16)

# A matrix larger than this is updated some rows at a time: 16 MiB for each float32 temporary, where
# the embedding of a 7B model would take 0.5 GB for each.
_PART_ELEMENTS = 2**22


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
    `folded_shape(parameter.shape, level)`. Any argument but `params` may be set by group.

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
        second_moment: "mean_square" or "square_mean".
        state_dtype: torch.float32 or torch.bfloat16.
        bias_correct_moments_only: Leave the residual out of the bias correction.

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, in the `state_dtype` of this optimizer's groups.

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
        saved_groups = [
            {**saved, "state_dtype": group["state_dtype"]}
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        # torch would cast the moments to the dtype of the parameter, so it is not given them.
        super().load_state_dict({**state_dict, "param_groups": saved_groups, "state": {}})
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    saved_state = state_dict["state"][key]
                    self.state[param] = restore(saved_state, param, group["state_dtype"])

    def update(self, param: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter from its gradient; what `step` does for each, one after the other.

        Args:
            param: A parameter of `group` that has a gradient.
            group: The entry of `param_groups` that holds it.

        Raises:
            RuntimeError: There is no gradient, or it is sparse or complex.
        """
        grad = param.grad
        if grad is None or grad.is_sparse or grad.is_complex():
            kind = "no" if grad is None else "a sparse" if grad.is_sparse else "a complex"
            raise RuntimeError(
                f"FOAM needs a dense real gradient, got {kind} one for a parameter of shape "
                f"{tuple(param.shape)}"
            )
        is_matrix = param.ndim >= 2
        level = group["level"] if is_matrix else 0
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = _zero_moment(param, level, group["state_dtype"])
            state["exp_avg_sq"] = _zero_moment(param, level, group["state_dtype"])
        state["step"] += 1
        for part in _row_parts(param, grad, state["exp_avg"], state["exp_avg_sq"]):
            foam_step_(
                *part,
                step=state["step"],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                level=level,
                scale=group["scale"] if is_matrix else 1.0,
                residual_scale=group["residual_scale"],
                second_moment=group["second_moment"],
                bias_correct_moments_only=group["bias_correct_moments_only"],
            )


def _zero_moment(param: Tensor, level: int, dtype: torch.dtype) -> Tensor:
    shape = folded_shape(param.shape, level)
    # Like a slice of the parameter, because a shape alone would not shard with a sharded parameter.
    like = param if param.shape == shape else param.narrow(-1, 0, shape[-1])
    return torch.zeros_like(like, dtype=dtype)


def _row_parts(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield views of the same rows of each, `_PART_ELEMENTS` of the parameter at most."""
    # Rows of a sharded tensor (a DTensor) cannot be split without communication.
    if param.ndim < 2 or param.numel() <= _PART_ELEMENTS or hasattr(param, "device_mesh"):
        yield param, grad, exp_avg, exp_avg_sq
        return
    rows = max(1, _PART_ELEMENTS // (param.numel() // len(param)))
    for start in range(0, len(param), rows):
        part = slice(start, start + rows)
        yield param[part], grad[part], exp_avg[part], exp_avg_sq[part]


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "scale", "residual_scale"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be a number of 0 or more, got {options[name]}")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers of 0 or more and below 1, got {betas}")
    check_level(options["level"])
    if options["second_moment"] not in get_args(SecondMoment):
        raise ValueError(
            f"second_moment must be one of {', '.join(get_args(SecondMoment))}, "
            f"got {options['second_moment']!r}"
        )
    if options["state_dtype"] not in _STATE_DTYPES:
        raise ValueError(
            f"state_dtype must be one of {', '.join(map(str, _STATE_DTYPES))}, "
            f"got {options['state_dtype']}"
        )
