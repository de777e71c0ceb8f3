"""The learning rate over a run."""

import math
from collections.abc import Callable


def warmup_cosine(
    num_steps: int, *, warmup_fraction: float, final_fraction: float
) -> Callable[[int], float]:
    """Give the learning-rate factor of every step: linear rise, then half a cosine.

    Args:
        num_steps: Optimizer steps of the whole run; the last one trains at `final_fraction`.
        warmup_fraction: Share of the steps that rise from near zero to 1.
        final_fraction: The factor at the end.
    """
    warmup_steps = max(1, round(num_steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step + 1 - warmup_steps) / max(1, num_steps - warmup_steps))
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
