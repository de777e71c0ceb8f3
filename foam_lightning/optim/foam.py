"""The FOAM optimizer: AdamW with moments folded along the columns of each matrix.

Uses a private part of torch, checked on torch 2.11 and 2.13: `torch._compile._disable_dynamo`, with
which torch's own optimizers are left out of a compiled program. `torch.compiler.disable` does the
same, and imports the compiler at once.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from foam_lightning.model.int8_weights import Int8Weight
from foam_lightning.optim.checkpoint import check_compatible, load_state_, readable_state
from foam_lightning.optim.dispatch import update_tensor_
from foam_lightning.optim.fold import folded_shape
from foam_lightning.optim.functional import StepFactors
from foam_lightning.optim.offload import HostState, host_memory_options, state_on_device
from foam_lightning.optim.options import check_adamw_options, check_options
from foam_lightning.optim.state import SecondMoment, state_layout

# Options of how the state is stored and computed: each run sets its own, whatever is saved.
_SET_BY_EACH_RUN = ("state_dtype", "state_offload", "fused")


class FOAM(torch.optim.Optimizer):
    """AdamW that stores one moment per block of 2**level columns: the mean over the block.

    The residual, the gradient minus its block means, enters the update of the same step and is
    never stored. Source: FOAM (Wen et al. 2025, arXiv:2512.07112). Where paper and released code
    disagree:

    - The second moment is the mean of squares, as in the released code;
      `second_moment="square_mean"` is the square of the mean, as in the paper.
    - A ragged last block is the mean over the columns that exist.
    - A block wider than the matrix is the whole row ("row fold").
    - eps is added after bias correction and weight decay acts before the update, as in
      torch.optim.AdamW. Level 0 with scale 1 is torch.optim.AdamW: on a CPU to the last bit in
      float64, and in float32 with `fused=False`.
    - The whole update is bias-corrected, residual included; `bias_correct_moments_only` leaves the
      residual out.
    - Tensors with fewer than two dimensions are never folded and have scale 1. Parameter groups
      decide which matrices fold: see `foam_lightning.optim.groups`.
    - The moments have dtype `state_dtype`, whatever the dtype of the gradient; in place of float32,
      those of float64 parameters have float64, as has their update.

    State of each parameter: `step` (int), `exp_avg` and `exp_avg_sq`, both of shape
    `folded_shape(parameter.shape, level)`, and with int8 their scales; see
    `foam_lightning.optim.state`. Every argument except `params` may be set per group.

    A matrix may be an `Int8Weight`: its update is computed in float32 and rounded stochastically.

    A gradient that is not finite makes only its own block of weights and moments not finite. A
    sharded parameter (a DTensor) is updated shard by shard, without communication: rows may be
    sharded, folded columns may not.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either. With names, errors
            about checkpoints name the parameter.
        lr: Learning rate, 0 or more; a number or, as `betas`, a tensor of one value.
        betas: Decay of the first and of the second moment, each in [0, 1).
        eps: Added to the root of the second moment, 0 or more.
        weight_decay: Decoupled weight decay, 0 or more, not multiplied by `scale`.
        level: Fold level, 0 to 62: 2**level adjacent columns share one moment.
        scale: Factor of lr in the update of matrices, 0 or more. The best value depends on `level`.
        residual_scale: Weight of the residual, 0 or more.
        second_moment: What the second moment averages, "mean_square" or "square_mean".
        state_dtype: torch.float32, torch.bfloat16 or torch.int8 (1.02 bytes a value with scales).
        bias_correct_moments_only: Leave the residual out of the bias correction.
        clip_norm: If set, the L2 norm to which each parameter's gradient is clipped by itself.
        stochastic_rounding: Round bfloat16 weights, and moments in bfloat16 or int8,
            stochastically. Rounding to nearest loses updates below 1/512 of a weight.
        fused: Update in one pass over memory where possible: in float32 on the CPU by a kernel that
            is compiled once (needs a C++ compiler), on a GPU by a Triton kernel. Needs no
            temporaries, and differs from the plain update in the last bits. None is True.
        state_offload: Keep the moments in host memory (pinned, for CUDA) and copy those of one
            parameter at a time to the device for its update. Costs 2 x the state's bytes over the
            bus a step and changes no result; see `offload`. No effect on the CPU.
        maximize: Maximize the objective: step along the gradient, not against it.
        foreach: None or False. This and the arguments below are those of torch.optim.AdamW, here
            so that code written for it runs; a value that would change something is refused.
        amsgrad: False.
        capturable: False.
        differentiable: False.

    Raises:
        ValueError: An argument, or an entry of a group, is out of range or not supported.
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
        fused: bool | None = None,
        state_offload: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        amsgrad: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_adamw_options(
            foreach=foreach, amsgrad=amsgrad, capturable=capturable, differentiable=differentiable
        )
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
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a checkpoint, perhaps older than an option."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not set get the defaults.

        Raises:
            ValueError: An entry is out of range or not supported.
        """
        if isinstance(param_group, dict):  # what is not, torch refuses
            check_adamw_options(**param_group)
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # torch.compile cannot trace the kernels, so it runs this as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, one after the other.

        Args:
            closure: Computes loss and gradients; runs with gradients enabled.

        Returns:
            The result of `closure`, or None without one.

        Raises:
            RuntimeError: A gradient is sparse or complex, or the state of a parameter is of another
                level or shape.
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
        """Return the state in the format of every torch optimizer, wherever the moments are stored.

        Loading ignores `state_dtype`, `state_offload` and `fused`: each run sets its own.
        `torch.distributed.checkpoint` needs all options of the groups, though, and accepts only
        numbers, strings and tensors, so `state_dtype` is saved as its name.
        """
        full = super().state_dict()
        # Plain dicts, because files with `HostState` would not load with `weights_only`, and FSDP2
        # gathers only numbers, strings and tensors.
        return {
            "state": {key: dict(state) for key, state in full["state"].items()},
            "param_groups": [
                {**group, "state_dtype": str(group["state_dtype"]).removeprefix("torch.")}
                for group in full["param_groups"]
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; dtype and device of the moments are those that this optimizer's groups set.

        Options that may change during a run (lr, scale, ...) come from `state_dict`, as in every
        torch optimizer. Fold levels and `second_moment` must be equal, as the state depends on
        them. A state of torch.optim.AdamW is one at level 0; what AdamW does not have, such as
        `scale`, stays as it is here. (AdamW loads a state of FOAM at level 0 too.)

        Args:
            state_dict: From `state_dict()` of a FOAM or torch.optim.AdamW with the same parameters
                in the same groups.

        Raises:
            CheckpointError: The state is of other parameters, levels, shapes or another optimizer;
                the message names the first parameter that differs, or its number if names are
                unknown.
        """
        saved: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            saved.update(readable_state(loaded))
            check_compatible(self.param_groups, saved)
            # Options that an older version did not save also get this run's value.
            saved["param_groups"] = [
                {**group, **loaded, **{key: group[key] for key in _SET_BY_EACH_RUN}}
                for group, loaded in zip(self.param_groups, saved["param_groups"], strict=True)
            ]
            # Without the moments, which torch would cast to the dtype of the parameter.
            return {**saved, "state": {}}

        def load_moments(_: torch.optim.Optimizer) -> None:
            for group, loaded in zip(self.param_groups, saved["param_groups"], strict=True):
                for param, key in zip(group["params"], loaded["params"], strict=True):
                    if key in saved["state"]:
                        self.state[param] = _create_state(param, group)
                        load_state_(self.state[param], saved["state"][key])

        # As hooks, the last before torch loads and the first after: between those of the user.
        with (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(load_moments, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def update(self, param: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter from its gradient; `step` does so for each.

        Args:
            param: A parameter of `group` that has a gradient.
            group: The entry of `param_groups` that holds it.

        Raises:
            RuntimeError: The gradient is missing, sparse or complex, or the state is of another
                level or shape.
        """
        grad = param.grad
        if grad is None or grad.layout != torch.strided or grad.is_complex():
            kind = "no" if grad is None else "a complex" if grad.is_complex() else "a sparse"
            raise RuntimeError(
                f"FOAM needs a dense, real gradient, got {kind} gradient for a parameter of shape "
                f"{tuple(param.shape)}"
            )
        if param.numel() == 0:
            return
        if group["maximize"]:
            grad = -grad
        is_matrix = param.ndim >= 2
        if not self.state[param]:
            self.state[param] = _create_state(param, group)
        state = self.state[param]
        level = group["level"] if is_matrix else 0
        if tuple(state["exp_avg"].shape) != folded_shape(param.shape, level):
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has moments of shape "
                f"{tuple(state['exp_avg'].shape)}, and fold level {level} needs "
                f"{folded_shape(param.shape, level)}; do not change level or shape after a step"
            )
        state["step"] += 1
        clip_norm, clip_factor = group["clip_norm"], None
        if clip_norm is not None:
            norm_dtype = torch.promote_types(grad.dtype, torch.float32)
            norm = _full_tensor(torch.linalg.vector_norm(grad, dtype=norm_dtype))
            clip_factor = clip_norm / norm.clamp_min(clip_norm)
        beta1, beta2 = map(float, group["betas"])
        factors = StepFactors.at_step(
            state["step"],
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            scale=group["scale"] if is_matrix else 1.0,
            residual_scale=group["residual_scale"],
            bias_correct_moments_only=group["bias_correct_moments_only"],
        )
        local = {key: _local_shard(value) for key, value in state.items() if key != "step"}
        offload = group["state_offload"]
        with state_on_device(local, param.device) if offload else nullcontext(local) as moments:
            update_tensor_(
                _local_shard(param.detach()),
                _local_shard(grad),
                moments,
                factors,
                seed=state["step"] if group["stochastic_rounding"] else None,
                fused=group["fused"] is not False,
                clip_factor=clip_factor,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                level=level,
                second_moment=group["second_moment"],
            )


def _create_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Create the state of a parameter before its first step, sharded like the parameter."""
    level = group["level"]
    if (
        level > 0
        and param.ndim >= 2
        and any(p.is_shard(param.ndim - 1) for p in getattr(param, "placements", ()))
    ):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} at fold level {level} has sharded columns, "
            "which cannot fold; shard its rows (dimension 0), as FSDP2 does, or set level 0"
        )
    memory_options = host_memory_options(param) if group["state_offload"] else {}
    # Of an int8 weight the codes, since one like it would be dequantized first.
    like = param.codes if isinstance(param, Int8Weight) else param.detach()
    state_dtype = group["state_dtype"]
    if state_dtype == torch.float32:
        state_dtype = torch.promote_types(param.dtype, state_dtype)
    moments = {
        # Like a slice of the parameter, because `torch.zeros` of a shape would not be sharded.
        key: torch.zeros_like(
            like if like.shape == shape else like.narrow(-1, 0, shape[-1]),
            dtype=dtype,
            **memory_options,
        )
        for key, (shape, dtype) in state_layout(param.shape, level, state_dtype).items()
    }
    state = {"step": 0, **moments}
    return HostState(state) if group["state_offload"] else state


def _local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, and any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def _full_tensor(tensor: Tensor) -> Tensor:
    """Gather a DTensor, and return any other tensor as it is."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor
