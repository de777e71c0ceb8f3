"""From short runs to the full run: the learning rate by length, and predicted differences."""

import math
from dataclasses import replace

from foam_lightning.plan import FoldPlan
from tuner.planning.scales import round_to_three_digits
from tuner.trials.runner import Difference

# The best peak learning rate falls as a power of the number of steps. For Adam the exponent is 0.32
# at scale (Bjorck et al. 2024, arXiv:2409.19913) and 0.26 here. For folded plans it is 0.5 to 0.6
# here (docs/log.md), on runs that are no longer than the averaging window of the second moment.
ADAM_EXPONENT = 0.32
FOLDED_EXPONENT = 0.5
# The largest ratio of lengths measured; the correction does not grow beyond it.
MAX_LENGTH_RATIO = 8.0


def plan_for_length(plan: FoldPlan, num_steps: int, full_steps: int) -> FoldPlan:
    """Adapt the learning rate of a plan to a run of another length.

    Args:
        plan: For the full run.
        num_steps: Optimizer steps of the run, 1 or more.
        full_steps: Those of the full run, 1 or more.

    Returns:
        The plan with its rate times a power of full_steps / num_steps, a ratio that is limited to
        `MAX_LENGTH_RATIO` either way.
    """
    ratio = min(max(full_steps / num_steps, 1 / MAX_LENGTH_RATIO), MAX_LENGTH_RATIO)
    exponent = FOLDED_EXPONENT if any(plan.levels.values()) else ADAM_EXPONENT
    return replace(plan, lr=round_to_three_digits(plan.lr * ratio**exponent))


# The share of a difference between two folded plans that remains on a run four times as long: 0.55
# on the default model, 0.90 on a larger one, from 300 to 1200 steps, each at the learning rate of
# its length (docs/log.md). A difference to Adam stays: 1.09 and 0.92.
GAP_REMAINING = 0.75
# Standard deviation of that prediction: in nats per token, and as a share of the difference.
TRANSFER_DEVIATION = 0.02
TRANSFER_SHARE = 0.25
_MEASURED_RATIO = 4.0


def predict_full_run(
    difference: Difference, to_adam: bool, *, num_steps: int, full_steps: int
) -> Difference:
    """Predict a difference on the full run from that on shorter runs.

    Args:
        difference: Measured on complete runs of `num_steps`.
        to_adam: Whether one of the two plans is Adam, and the other is not.
        num_steps: Their optimizer steps.
        full_steps: Optimizer steps of the full run. If it is not longer, the difference stays; if
            it is more than four times as long, the prediction is that for four times, the largest
            ratio measured.

    Returns:
        The difference with its 95 % interval, from the errors of measurement and prediction.
    """
    ratio = min(max(full_steps / num_steps, 1.0), _MEASURED_RATIO)
    share = math.log(ratio) / math.log(_MEASURED_RATIO)
    remaining = 1.0 if to_adam else GAP_REMAINING**share
    deviation = math.hypot(TRANSFER_DEVIATION, TRANSFER_SHARE * difference.mean)
    transfer = 1.96 * deviation * math.sqrt(share)
    return Difference(
        remaining * difference.mean, math.hypot(remaining * difference.half_width, transfer)
    )
