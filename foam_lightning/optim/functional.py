"""The FOAM update of one tensor as pure functions: the reference that every faster kernel matches.

Shapes: R rows (any leading dimensions), C columns, K = ceil(C / 2**level) blocks in a row.

Source: FOAM (Wen et al. 2025, arXiv:2512.07112). With G the gradient, t the step counted from 1,
rho the residual scale and bc_i = 1 - beta_i**t:

    E = G - unfold(fold(G))
    m = beta1 * m + (1 - beta1) * fold(G)
    v = beta2 * v + (1 - beta2) * fold(G * G)
    M = unfold(m) + rho * E
    V = unfold(v) + rho**2 * E * E
    W = (1 - lr * weight_decay) * W - lr * scale * (M / bc1) / (sqrt(V / bc2) + eps)

With `second_moment="square_mean"`, v averages fold(G)**2 instead, as printed in the paper.

Departures from the released code: eps is added after bias correction and weight decay acts before
the update, both as in torch.optim.AdamW. On a CPU, level 0 with scale 1 is AdamW to the last bit in
float32 and float64.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, promote_types

from foam_lightning.optim import rounding
from foam_lightning.optim.fold import add_unfolded_, fold
from foam_lightning.optim.state import SecondMoment, read_moment, write_moment_


class StepFactors(NamedTuple):
    """The factors of the update that change from step to step.

    Attributes:
        decay: 1 - lr * weight_decay, the factor of the weights.
        step_size: lr * scale.
        bias_correction1: bc1.
        residual: Factor of the residual in M: rho.
        residual_square: Factor of the squared residual in V: rho**2.
        sqrt_bias_correction2: sqrt(bc2).
    """

    decay: float
    step_size: float
    bias_correction1: float
    residual: float
    residual_square: float
    sqrt_bias_correction2: float

    @classmethod
    def at_step(
        cls,
        step: int,
        *,
        beta1: float,
        beta2: float,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        residual_scale: float = 1.0,
        bias_correct_moments_only: bool = False,
    ) -> "StepFactors":
        """Compute the factors of one step.

        Args:
            step: t, 1 at the first update.
            beta1: Decay of m, in [0, 1).
            beta2: Decay of v, in [0, 1).
            lr: Learning rate.
            weight_decay: Decoupled: the weights are first multiplied by 1 - lr * weight_decay.
            scale: Factor of lr in the update, not in the weight decay.
            residual_scale: rho. At 0 only the folded gradient acts.
            bias_correct_moments_only: By default all of M and V is bias-corrected, residual
                included. The residual needs no correction, so it is damped by about
                sqrt(1 - beta2**t): a warm-up over the first 1 / (1 - beta2) steps, without which
                measured losses were worse. If set, M = unfold(m) / bc1 + rho * E and
                V = unfold(v) / bc2 + rho**2 * E * E.
        """
        bias_correction1, bias_correction2 = 1 - beta1**step, 1 - beta2**step
        residual, residual_square = residual_scale, residual_scale**2
        if bias_correct_moments_only:
            # Cancels the division by the bias corrections, which M and V undergo as a whole.
            residual *= bias_correction1
            residual_square *= bias_correction2
        return cls(
            decay=1 - lr * weight_decay,
            step_size=lr * scale,
            bias_correction1=bias_correction1,
            residual=residual,
            residual_square=residual_square,
            sqrt_bias_correction2=bias_correction2**0.5,
        )


@torch.no_grad()
def foam_step_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    factors: StepFactors,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    level: int,
    second_moment: SecondMoment = "mean_square",
    seed: int | None = None,
    first_row: int = 0,
) -> None:
    """Update one tensor and its moments in place.

    Computes in float32, or in float64 for weights in float64: the update uses the moments before
    they are rounded to their storage dtype, and each stored value is rounded once.

    Args:
        param: Weights, shape (..., C), changed.
        grad: Gradient, shape (..., C), unchanged.
        state: The tensors that `state.state_layout` describes, changed.
        factors: The factors of this step.
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        eps: Added to the root of the bias-corrected V.
        level: Fold level, 0 or more. For a tensor that must not fold, 0.
        second_moment: What v averages, see above. At level 0 both choices coincide.
        seed: Of stochastic rounding, which applies to weights and moments in bfloat16 and to
            moments in int8; see `rounding`. None rounds to nearest.
        first_row: Where `param` is some rows of a tensor, the index of the first: the random bits
            are those of the whole tensor.
    """
    dtype = promote_types(promote_types(param.dtype, grad.dtype), torch.float32)
    folded_RK = fold(grad, level).to(dtype)
    # Each stored tensor gets its own noise.
    seeds = [
        None if seed is None else rounding.seed_at(seed + number, first_row * math.prod(shape[1:]))
        for number, shape in enumerate((folded_RK.shape, folded_RK.shape, param.shape))
    ]
    m_RK = read_moment(state, "exp_avg").to(dtype).lerp_(folded_RK, 1 - beta1)
    write_moment_(state, "exp_avg", m_RK, seeds[0])
    v_RK = read_moment(state, "exp_avg_sq").to(dtype).mul_(beta2)
    if level == 0 or second_moment == "square_mean":
        v_RK.addcmul_(folded_RK, folded_RK, value=1 - beta2)
    else:
        v_RK.add_(fold(grad.to(dtype).square(), level), alpha=1 - beta2)
    write_moment_(state, "exp_avg_sq", v_RK, seeds[1])
    if level == 0:  # no residual: M = m, V = v
        denominator, numerator = v_RK.sqrt(), m_RK.clone()
    else:
        residual_RC = grad.to(dtype, copy=True)
        add_unfolded_(residual_RC, folded_RK, level, alpha=-1)
        V_RC = residual_RC.square().mul_(factors.residual_square)
        denominator = add_unfolded_(V_RC, v_RK, level).sqrt_()
        # M reuses the memory of the residual.
        numerator = add_unfolded_(residual_RC.mul_(factors.residual), m_RK, level)
    denominator.div_(factors.sqrt_bias_correction2).add_(eps)
    # The order of AdamW's addcdiv: any other differs in the last bit.
    update = numerator.mul_(-factors.step_size / factors.bias_correction1).div_(denominator)
    weights = param.to(dtype).mul_(factors.decay).add_(update)
    if param.dtype == torch.bfloat16 and seeds[2] is not None:
        weights = rounding.to_bfloat16(weights.float(), seeds[2])
    param.copy_(weights)
