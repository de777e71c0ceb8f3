"""The outcome of a search: every short run, the finalists, and the winner."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner.finals import Candidate, Kind
from tuner.objective import Difference


@dataclass(frozen=True)
class Searched:
    """One short run of the search, for the report.

    Attributes:
        stage: "uniform" or "mixed".
        description: What was tried.
        level: The uniform level, None for a mixed plan.
        state_bytes: Of the matrices that fold.
        loss: In nats per token; None if the run diverged.
    """

    stage: str
    description: str
    level: int | None
    state_bytes: int
    loss: float | None


@dataclass(frozen=True)
class Outcome:
    """What tuning found.

    Attributes:
        winner: The plan to train by.
        finalists: All that ran the final length, the winner among them.
        against_winner: Paired difference of every other finalist to the winner, by label.
        searched: Every short run of the search.
        update_rms: From the probe: RMS of Adam's and FOAM's update, by role and level.
        adam_state_bytes: Of the matrices that fold, at level 0: what to compare bytes of state to.
        short_run_steps: Optimizer steps of a short run; finalists took `FINAL_LENGTH` times that.
        reason: Why the winner won, in one sentence.
    """

    winner: Candidate
    finalists: Sequence[Candidate]
    against_winner: Mapping[str, Difference]
    searched: Sequence[Searched]
    update_rms: Mapping[str, Mapping[int, float]]
    adam_state_bytes: int
    short_run_steps: int
    reason: str

    def loss_of(self, kind: Kind) -> float | None:
        """Give the lowest final loss of a kind, None where none ran to its end."""
        losses = [
            c.run.loss for c in self.finalists if c.kind == kind and math.isfinite(c.run.loss)
        ]
        return min(losses, default=None)
