"""How much to search: number and length of the short runs, and seeds of the finals."""

import math
from dataclasses import dataclass
from typing import Self

from foam_lightning.errors import ConfigError

# Differences between short runs shrink in longer ones, so finalists run twice as long.
FINAL_LENGTH = 2
# Two Adams, two uniform plans, a mixed one.
MAX_FINALISTS = 5
# After 150 steps the plans of one of two models are in reverse order (docs/log.md).
_DEFAULT_STEPS = 300
_DEFAULT_TRIALS = 12


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How much to search.

    Args:
        fraction: Optimizer steps of the search as a fraction of those of the full run, above 0. If
            that is too few for any search, the plan is the one that `plan` shows.
        trials: Short runs of the search, better 4 or more; finalists run again. With it or `steps`,
            `fraction` does not count.
        steps: Optimizer steps of a short run; rankings mislead below 300.

    Raises:
        ConfigError: A number is out of range.
    """

    fraction: float = 0.02
    trials: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction < math.inf:
            raise ConfigError(
                f"tune.fraction must be above 0, got {self.fraction:g}; 0.02 is 2 % of the full run"
            )
        if self.trials is not None and self.trials < 1:
            raise ConfigError(f"tune.trials must be 1 or more, got {self.trials}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"tune.steps must be 1 or more, got {self.steps}")


@dataclass(frozen=True)
class SearchBudget:
    """Number and length of the runs of a search.

    Attributes:
        num_trials: Number of short runs.
        steps: Optimizer steps of a short run.
        num_seeds: Largest number of seeds in the finals.
    """

    num_trials: int
    steps: int
    num_seeds: int

    @classmethod
    def from_options(cls, options: TuneOptions, max_steps: int) -> Self | None:
        """Return the largest budget that the options allow.

        Args:
            options: How much to search.
            max_steps: Optimizer steps of the full run.

        Returns:
            The budget; None if the fraction allows no search.
        """
        if options.trials is not None or options.steps is not None:
            return cls(options.trials or _DEFAULT_TRIALS, options.steps or _DEFAULT_STEPS, 2)
        allowed = options.fraction * max_steps
        budgets = (cls(*sizes) for sizes in reversed(_SIZES))
        return next((b for b in budgets if b.max_steps_total <= allowed), None)

    @property
    def final_steps(self) -> int:
        """Optimizer steps of a run in the finals."""
        return FINAL_LENGTH * self.steps

    @property
    def max_steps_total(self) -> int:
        """Optimizer steps of the whole search if no finalist drops out."""
        return self.num_trials * self.steps + MAX_FINALISTS * self.num_seeds * self.final_steps


# Trials, steps and seeds of the finals, from the smallest search that is of use. Runs of 300 steps
# rank folded plans as long runs do if they differ by 0.02 nats or more; runs of 150 steps do so on
# one of two models, from 0.03 on (docs/log.md). So more trials come first, then a second seed.
_SIZES = (
    (4, 300, 1),
    (8, 300, 1),
    (12, 300, 1),
    (12, 300, 2),
    (24, 300, 2),
    (24, 300, 3),
    (24, 600, 3),
)
SMALLEST_SEARCH = SearchBudget(*_SIZES[0])
