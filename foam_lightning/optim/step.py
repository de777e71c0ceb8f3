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
"""

from typing import Literal

import torch
from torch import Tensor

from foam_lightning.optim.fold import add_unfolded_, fold

SecondMoment = Literal["mean_square", "square_mean"]


@torch.no_grad()
def foam_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    level: int,
    scale: float,
    residual_scale: float,
    second_moment: SecondMoment,
    bias_correct_moments_only: bool,
) -> None:
    """Update one tensor and its two moments in place.

    Arithmetic is float32 whatever the dtypes: the update uses the moments before they are rounded
    to the dtype they are stored in, and each stored value is rounded once. Temporaries in float32:
    two of the size of the parameter, three if it is bfloat16; and of the size of a moment, the
    folded gradient and, if they are bfloat16, the two moments.

    Args:
        param: The weights, shape (..., C), changed.
        grad: Their gradient, shape (..., C), left as it is.
        exp_avg: m, shape (..., K), changed.
        exp_avg_sq: v, shape (..., K), changed.
        step: t, 1 at the first update.
        lr: Learning rate.
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        eps: Added to the root of the bias-corrected V.
        weight_decay: Decoupled: the weights first shrink by the factor 1 - lr * weight_decay.
        level: Fold level, 0 or more. For a tensor that must not fold, 0.
        scale: Factor of lr in the update; weight decay does not see it.
        residual_scale: rho, the weight of the residual. At 0 only the folded gradient acts.
        second_moment: What v averages: "mean_square" is fold(G * G), "square_mean" fold(G)**2. At
            level 0 they coincide.
        bias_correct_moments_only: See `foam_direction`.
    """
    folded_RK = fold(grad, level)
    mean_RK = exp_avg.float().lerp_(folded_RK, 1 - beta1)
    square_RK = exp_avg_sq.float().mul_(beta2)
    if level == 0 or second_moment == "square_mean":
        square_RK.addcmul_(folded_RK, folded_RK, value=1 - beta2)
    else:
        square_RK.add_(fold(grad.float().square(), level), alpha=1 - beta2)
    # Where the state is float32, .float() is the state itself and this copies nothing.
    exp_avg.copy_(mean_RK)
    exp_avg_sq.copy_(square_RK)

    numerator, denominator = _fraction(
        grad,
        folded_RK,
        mean_RK,
        square_RK,
        bias_correction1=1 - beta1**step,
        bias_correction2=1 - beta2**step,
        eps=eps,
        level=level,
        residual_scale=residual_scale,
        bias_correct_moments_only=bias_correct_moments_only,
    )
    weights = param.float()
    if weight_decay != 0:
        weights.mul_(1 - lr * weight_decay)
    weights.addcdiv_(numerator, denominator, value=-lr * scale / (1 - beta1**step))
    param.copy_(weights)


@torch.no_grad()
def foam_direction(
    grad_RC: Tensor,
    exp_avg_RK: Tensor,
    exp_avg_sq_RK: Tensor,
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    level: int,
    residual_scale: float = 1.0,
    bias_correct_moments_only: bool = False,
) -> Tensor:
    """Compute (M / bc1) / (sqrt(V / bc2) + eps), what `foam_step_` subtracts lr * scale times.

    Folding is linear, so with second_moment="mean_square" the moments of a run at any level are
    `fold(m, level)` and `fold(v, level)` of an Adam run that saw the same gradients.

    Args:
        grad_RC: The gradient of this step, shape (..., C).
        exp_avg_RK: m, which has already seen this gradient, shape (..., K).
        exp_avg_sq_RK: v, likewise.
        step: t, 1 at the first update.
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        eps: Added to the root of the bias-corrected V.
        level: Fold level, 0 or more.
        residual_scale: rho, the weight of the residual.
        bias_correct_moments_only: By default the whole of M and V is bias-corrected, residual
            included. It needs no such correction, so it is damped by about sqrt(1 - beta2**t): a
            warm-up over the first 1 / (1 - beta2) steps, without which measured losses were worse.
            If set, M = unfold(m) / bc1 + rho * E and V = unfold(v) / bc2 + rho**2 * E * E.

    Returns:
        Shape (..., C), float32, a new tensor.
    """
    bias_correction1 = 1 - beta1**step
    numerator, denominator = _fraction(
        grad_RC,
        fold(grad_RC, level),
        exp_avg_RK.float(),
        exp_avg_sq_RK.float(),
        bias_correction1=bias_correction1,
        bias_correction2=1 - beta2**step,
        eps=eps,
        level=level,
        residual_scale=residual_scale,
        bias_correct_moments_only=bias_correct_moments_only,
    )
    return (numerator / denominator).div_(bias_correction1)


def _fraction(
    grad_RC: Tensor,
    folded_RK: Tensor,
    mean_RK: Tensor,
    square_RK: Tensor,
    *,
    bias_correction1: float,
    bias_correction2: float,
    eps: float,
    level: int,
    residual_scale: float,
    bias_correct_moments_only: bool,
) -> tuple[Tensor, Tensor]:
    """Compute M and sqrt(V / bc2) + eps, without changing an argument.

    They come apart, and without bc1, because AdamW divides the step size by bc1 and fuses the
    division of the two into the update: any other order differs in the last bit.
    """
    if level == 0:
        return mean_RK, square_RK.sqrt().div_(bias_correction2**0.5).add_(eps)
    mean_factor, square_factor = residual_scale, residual_scale**2
    if bias_correct_moments_only:
        # What the common division takes from the residual is given to it beforehand.
        mean_factor *= bias_correction1
        square_factor *= bias_correction2
    residual_RC = grad_RC.to(torch.float32, copy=True)
    add_unfolded_(residual_RC, folded_RK, level, alpha=-1)
    v_RC = residual_RC.square().mul_(square_factor)
    add_unfolded_(v_RC, square_RK, level)
    m_RC = residual_RC.mul_(mean_factor)
    add_unfolded_(m_RC, mean_RK, level)
    return m_RC, v_RC.sqrt_().div_(bias_correction2**0.5).add_(eps)
