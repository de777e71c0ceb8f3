"""The learning rate as a function of the step."""

import math
from collections.abc import Callable

from foam_lightning.settings import ScheduleName


def learning_rate_factor(
    num_steps: int,
    *,
    schedule: ScheduleName,
    warmup_fraction: float,
    decay_fraction: float,
    final_fraction: float,
) -> Callable[[int], float]:
    """Return the factor of the peak learning rate as a function of the step, counted from 0.

    The factor rises to 1 in equal parts, then follows the schedule.

    Args:
        num_steps: Optimizer steps of the whole run; the last one has the factor `final_fraction`,
            or 1 if the schedule is constant. The factor stays there after it.
        schedule: "cosine" falls along half a cosine, "linear" along a line, "constant" stays at 1,
            and "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays at 1 and
            falls along a line at the end.
        warmup_fraction: Fraction of the steps over which the factor rises, 0 to 1.
        decay_fraction: Fraction of the steps over which "wsd" falls, 0 to 1; at most those after
            the warm-up.
        final_fraction: The factor at the end, 0 to 1.
    """
    warmup_steps = max(1, round(num_steps * warmup_fraction))
    falling_steps = max(1, num_steps - warmup_steps)
    if schedule == "wsd":
        falling_steps = min(falling_steps, max(1, round(num_steps * decay_fraction)))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = min(1.0, max(0.0, 1 - (num_steps - 1 - step) / falling_steps))
        height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
        return final_fraction + (1 - final_fraction) * height

    return factor
