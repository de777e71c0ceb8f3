"""The horizon: what a run of another length takes from the full run, and what it says of it."""

import math
from dataclasses import replace

from foam_lightning.plan import FoldPlan
from tuner.planning.scales import round_to_three_digits
from tuner.trials.runner import Difference

# The best peak learning rate falls as a power of the number of steps. For Adam it was measured at
# scale (.32: Bjorck et al. 2024, arXiv:2409.19913), and here (.26); that of plans that fold falls
# faster here (.5 to .6, docs/log.md), where the runs are not longer than their second moment lasts.
ADAM_EXPONENT = 0.32
FOLDED_EXPONENT = 0.5
# Nothing was measured beyond this ratio of lengths: the correction stays there.
MAX_LENGTH_RATIO = 8.0


def plan_for_length(plan: FoldPlan, num_steps: int, full_steps: int) -> FoldPlan:
    """Give a plan the learning rate that does on so many steps what its own does on the full run.

    Args:
        plan: For the full run.
        num_steps: Optimizer steps of the other run, 1 or more.
        full_steps: Those of the full run, 1 or more.

    Returns:
        The plan with its rate times a power of full / other, a ratio that counts up to
        `MAX_LENGTH_RATIO`.
    """
    ratio = min(max(full_steps / num_steps, 1 / MAX_LENGTH_RATIO), MAX_LENGTH_RATIO)
    exponent = FOLDED_EXPONENT if any(plan.levels.values()) else ADAM_EXPONENT
    return replace(plan, lr=round_to_three_digits(plan.lr * ratio**exponent))


# Of a gap between two plans that fold, so much is left on a run four times as long: .55 on the
# default model, .90 on a larger one. Of one to Adam all is: 1.09 and .92. The gap there lies so far
# from that: one deviation, in nats per token, and the same as a share of the gap. From 300 and 1200
# steps, each at the learning rate of its length (docs/log.md).
GAP_REMAINING = 0.75
TRANSFER_DEVIATION = 0.02
TRANSFER_SHARE = 0.25
_MEASURED_RATIO = 4.0


def predict_full_run(
    difference: Difference, to_adam: bool, *, num_steps: int, full_steps: int
) -> Difference:
    """Predict from a gap what it will be on the full run.

    Args:
        difference: Measured on complete runs of `num_steps`.
        to_adam: Whether one of the two plans is Adam, and the other is not.
        num_steps: Their optimizer steps.
        full_steps: Those of the full run; where it is not longer, gaps are what they are. From four
            times as long on, nothing was measured, and the prediction stays that of four times.

    Returns:
        The gap with its 95 % interval, which holds that of the measurement and the transfer.
    """
    ratio = min(max(full_steps / num_steps, 1.0), _MEASURED_RATIO)
    share = math.log(ratio) / math.log(_MEASURED_RATIO)
    left = 1.0 if to_adam else GAP_REMAINING**share
    deviation = math.hypot(TRANSFER_DEVIATION, TRANSFER_SHARE * difference.mean)
    transfer = 1.96 * deviation * math.sqrt(share)
    return Difference(left * difference.mean, math.hypot(left * difference.half_width, transfer))
