"""One tensor's FOAM update, as functions of tensors and numbers.

fold -> moving averages of the folded gradient -> unfold + residual -> update

Shapes: R rows (any leading dimensions), C columns, K = ceil(C / 2**level) blocks in a row.

Source: FOAM (Wen et al. 2025, arXiv:2512.07112). With G the gradient, t the step counted from 1,
rho the residual scale and bc_i = 1 - beta_i**t:

    E = G - unfold(fold(G))
    m = beta1 * m + (1 - beta1) * fold(G)
    v = beta2 * v + (1 - beta2) * fold(G * G)
    M = unfold(m) + rho * E
    V = unfold(v) + rho**2 * E * E
    W = (1 - lr * weight_decay) * W - lr * scale * (M / bc1) / (sqrt(V / bc2) + eps)

Departures from the released code: eps is added after bias correction and weight decay acts before
the update, both as in torch.optim.AdamW. In float32, level 0 with scale 1 is AdamW to the last bit.

What v is, is the only thing in which the variants differ:

- "mean_square": as above. "square_mean": v averages fold(G)**2, as the paper prints.
- "row": v is one value a row, the average of the row's mean of squares, and V = v without the
  residual: the second moment of Adam-mini (Zhang et al. 2024, arXiv:2406.16793) under a folded
  first one.
- "none": no v. The update is M made orthogonal, as Muon does (Jordan et al. 2024) without its
  Nesterov step: Muon with a folded momentum.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from foam_lightning.optim import rounding
from foam_lightning.optim.fold import add_unfolded_, fold
from foam_lightning.optim.state import SecondMoment, read, write_

# Quintic of Muon's reference implementation: five rounds bring singular values near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class StepFactors(NamedTuple):
    """What changes from step to step.

    Numbers, or tensors of no dimension for a compiled update, which a new number would compile
    again.

    Attributes:
        shrink: 1 - lr * weight_decay.
        size: lr * scale.
        bias_correction1: bc1.
        residual_mean: Of the residual in M: rho.
        residual_square: Of its square in V: rho**2.
        root_bias_correction2: sqrt(bc2).
    """

    shrink: float
    size: float
    bias_correction1: float
    residual_mean: float
    residual_square: float
    root_bias_correction2: float

    @classmethod
    def at(
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
        """Compute them for a step.

        Args:
            step: t, 1 at the first update.
            beta1: Decay of m, in [0, 1).
            beta2: Decay of v, in [0, 1).
            lr: Learning rate.
            weight_decay: Decoupled: the weights first shrink by the factor 1 - lr * weight_decay.
            scale: Factor of lr in the update; weight decay does not see it.
            residual_scale: rho. At 0 only the folded gradient acts.
            bias_correct_moments_only: By default the whole of M and V is bias-corrected, residual
                included. It needs no such correction, so it is damped by about
                sqrt(1 - beta2**t): a warm-up over the first 1 / (1 - beta2) steps, without which
                measured losses were worse. If set, M = unfold(m) / bc1 + rho * E and
                V = unfold(v) / bc2 + rho**2 * E * E.
        """
        bias_correction1, bias_correction2 = 1 - beta1**step, 1 - beta2**step
        residual_mean, residual_square = residual_scale, residual_scale**2
        if bias_correct_moments_only:
            # What the common division takes from the residual is given to it beforehand.
            residual_mean *= bias_correction1
            residual_square *= bias_correction2
        return cls(
            shrink=1 - lr * weight_decay,
            size=lr * scale,
            bias_correction1=bias_correction1,
            residual_mean=residual_mean,
            residual_square=residual_square,
            root_bias_correction2=bias_correction2**0.5,
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
    seed: int | Tensor | None = None,
) -> None:
    """Update one tensor and its moments in place.

    Arithmetic is float32 whatever the dtypes: the update uses the moments before they are rounded
    to what they are stored in, and each stored value is rounded once.

    Args:
        param: The weights, shape (..., C), changed.
        grad: Their gradient, shape (..., C), left as it is.
        state: The tensors that `state.layouts` describes, changed.
        factors: What changes from step to step.
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        eps: Added to the root of the bias-corrected V.
        level: Fold level, 0 or more. For a tensor that must not fold, 0.
        second_moment: What v is, see above. At level 0, "mean_square" and "square_mean" coincide.
        seed: For rounding at random where weights or moments are bfloat16, and moments int8; see
            `rounding`. None rounds to the nearest.
    """
    # Each stored tensor takes noise of its own.
    seeds = (None, None, None) if seed is None else (seed, seed + 1, seed + 2)
    folded_RK = fold(grad, level)
    mean_RK = read(state, "exp_avg").lerp_(folded_RK, 1 - beta1)
    write_(state, "exp_avg", mean_RK, seeds[0])
    if second_moment == "none" and grad.ndim >= 2:
        residual_RC = _residual(grad, folded_RK, level)
        momentum_RC = _first_moment(mean_RK, residual_RC, factors, level)
        # A bias correction would change nothing: what is made orthogonal has no length.
        update = orthogonal(momentum_RC).mul_(-factors.size)
    else:
        is_row = second_moment == "row" and grad.ndim >= 2
        square_RK = read(state, "exp_avg_sq").mul_(beta2)
        if is_row:
            square_RK.add_(grad.float().square().mean(dim=-1, keepdim=True), alpha=1 - beta2)
        elif level == 0 or second_moment == "square_mean":
            square_RK.addcmul_(folded_RK, folded_RK, value=1 - beta2)
        else:
            square_RK.add_(fold(grad.float().square(), level), alpha=1 - beta2)
        write_(state, "exp_avg_sq", square_RK, seeds[1])
        residual_RC = _residual(grad, folded_RK, level)
        denominator = _denominator(square_RK, None if is_row else residual_RC, factors, eps, level)
        numerator = _first_moment(mean_RK, residual_RC, factors, level)
        # The order of AdamW's addcdiv: any other differs in the last bit.
        update = numerator.mul_(-factors.size / factors.bias_correction1).div_(denominator)
    weights = param.float().mul_(factors.shrink).add_(update)
    if param.dtype == torch.bfloat16 and seeds[2] is not None:
        weights = rounding.to_bfloat16(weights, seeds[2])
    param.copy_(weights)


def orthogonal(m_RC: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iteration.

    Source: Muon (Jordan et al. 2024); its scale for matrices with more rows than columns, the
    root of R / C, is included. Departure: float32 instead of bfloat16.

    Args:
        m_RC: Two or more dimensions, float32; the last two are the matrix.
    """
    rows, columns = m_RC.shape[-2:]
    x = m_RC.mT if rows > columns else m_RC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = _QUINTIC[0] * x + (_QUINTIC[1] * gram + _QUINTIC[2] * (gram @ gram)) @ x
    found: Tensor = x.mT if rows > columns else x
    return found * math.sqrt(max(1.0, rows / columns))


def _residual(grad_RC: Tensor, folded_RK: Tensor, level: int) -> Tensor | None:
    """Compute E in float32, a new tensor; None at level 0, where it is 0."""
    if level == 0:
        return None
    return add_unfolded_(grad_RC.to(torch.float32, copy=True), folded_RK, level, alpha=-1)


def _denominator(
    square_RK: Tensor, residual_RC: Tensor | None, factors: StepFactors, eps: float, level: int
) -> Tensor:
    """Compute sqrt(V / bc2) + eps; without a residual V is v. No argument changes."""
    if residual_RC is None:
        root = square_RK.sqrt()
    else:
        v_RC = residual_RC.square().mul_(factors.residual_square)
        root = add_unfolded_(v_RC, square_RK, level).sqrt_()
    return root.div_(factors.root_bias_correction2).add_(eps)


def _first_moment(
    mean_RK: Tensor, residual_RC: Tensor | None, factors: StepFactors, level: int
) -> Tensor:
    """Compute M, in the memory of the residual; without one it is a copy of m."""
    if residual_RC is None:
        return mean_RK.clone()
    return add_unfolded_(residual_RC.mul_(factors.residual_mean), mean_RK, level)
