"""How much to search: short runs, their length and the seeds of the finals, and what they cost."""

import math
from dataclasses import dataclass
from typing import Self

from foam_lightning.errors import ConfigError

# A gap between short runs shrinks on longer ones, so finalists run twice as long, on other seeds.
FINAL_LENGTH = 2
# The two best Adams, the best uniform plan, another one, a mixed one.
MAX_FINALISTS = 5
# After 150 steps the plans of one model of two are in reverse order (docs/log.md).
_SHORTEST = 300


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How much to search.

    Args:
        fraction: Of the optimizer steps of the full run, how many the search may take, above 0.
            Where that is too few for any search, the plan is the one that `plan` shows.
        trials: Short runs of the search, 4 or more; finalists run again. Instead of `fraction`.
        steps: Optimizer steps of a short run; under 300, rankings mislead. Instead of `fraction`.

    Raises:
        ConfigError: A number is out of range.
    """

    fraction: float = 0.02
    trials: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be searched with."""
        if not 0 < self.fraction < math.inf:
            raise ConfigError(
                f"tune.fraction must be above 0, got {self.fraction:g}; .02 is 2 % of the full run"
            )
        if self.trials is not None and self.trials < 1:
            raise ConfigError(f"tune.trials must be 1 or more, got {self.trials}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"tune.steps must be 1 or more, got {self.steps}")


@dataclass(frozen=True)
class SearchBudget:
    """What a search spends.

    Attributes:
        num_trials: Short runs.
        steps: Optimizer steps of a short run.
        num_seeds: Seeds on which the finals run at most.
    """

    num_trials: int
    steps: int
    num_seeds: int

    @classmethod
    def of(cls, options: TuneOptions, max_steps: int) -> Self | None:
        """Find what the options pay for.

        Args:
            options: How much to search.
            max_steps: Optimizer steps of the full run.

        Returns:
            The dearest effort within the fraction, None where there is none; or the one that
            trials and steps ask for.
        """
        if options.trials is not None or options.steps is not None:
            return cls(options.trials or 12, options.steps or _SHORTEST, 2)
        paid = (cls(*rung) for rung in reversed(_LADDER))
        return next((e for e in paid if e.max_steps_total <= options.fraction * max_steps), None)

    @property
    def final_steps(self) -> int:
        """Optimizer steps of a run of the finals."""
        return FINAL_LENGTH * self.steps

    @property
    def max_steps_total(self) -> int:
        """The optimizer steps of the whole search, if no finalist drops out of the race."""
        return self.num_trials * self.steps + MAX_FINALISTS * self.num_seeds * self.final_steps


# From the least search that says anything: trials, steps, seeds of the finals. Runs of 300 steps
# order folded plans as long runs do from .02 nats apart on; those of 150 do on one model of two,
# and from .03 on (docs/log.md). So first a few more trials; then a second seed.
_LADDER = (
    (4, 300, 1),
    (8, 300, 1),
    (12, 300, 1),
    (12, 300, 2),
    (24, 300, 2),
    (24, 300, 3),
    (24, 600, 3),
)
SMALLEST_SEARCH = SearchBudget(*_LADDER[0])
