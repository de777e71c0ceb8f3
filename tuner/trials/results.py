"""The outcome of a search: every short run, the finalists, and the winner."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foam_lightning.plan import FoldPlan
from tuner.search.finals import Candidate, Kind
from tuner.trials.budget import Effort
from tuner.trials.runner import Difference, ShortRun


@dataclass(frozen=True)
class Searched:
    """One short run of the search, for the report.

    Attributes:
        stage: "uniform" or "mixed".
        description: What was tried.
        plan: What was run; all with the same seed, so that any two pair.
        run: What it lost.
        state_bytes: Of the matrices that fold.
        is_configured: Whether learning rate and scales are those of the settings.
    """

    stage: str
    description: str
    plan: FoldPlan
    run: ShortRun
    state_bytes: int
    is_configured: bool

    @property
    def level(self) -> int | None:
        """The uniform level, None for a mixed plan."""
        levels = set(self.plan.levels.values())
        return levels.pop() if len(levels) == 1 else None

    @property
    def loss(self) -> float | None:
        """In nats per token; None if the run diverged."""
        return self.run.loss if math.isfinite(self.run.loss) else None


@dataclass(frozen=True)
class Outcome:
    """What tuning found.

    Attributes:
        winner: The plan to train by.
        finalists: All that ran in the race, the winner among them.
        searched: Every short run of the search.
        adam_state_bytes: Of the matrices that fold, at level 0: what to compare bytes of state to.
        effort: The length of the runs.
        reason: Why the winner won, in one sentence.
    """

    winner: Candidate
    finalists: Sequence[Candidate]
    searched: Sequence[Searched]
    adam_state_bytes: int
    effort: Effort
    reason: str

    @property
    def against_winner(self) -> Mapping[str, Difference]:
        """Paired difference of every other finalist to the winner, by label."""
        return {c.label: c.against(self.winner) for c in self.finalists if c is not self.winner}

    @property
    def reference(self) -> Candidate | None:
        """Adam at its best in the finals; None where no run of it came to its end."""
        return self._best("reference")

    @property
    def baseline(self) -> Candidate:
        """What to compare all others with: Adam, else the best uniform plan, else the winner."""
        return self.reference or self._best("uniform") or self.winner

    def loss_of(self, kind: Kind) -> float | None:
        """Give the lowest final loss of a kind, None where none ran to its end."""
        best = self._best(kind)
        return None if best is None else best.loss

    def _best(self, kind: Kind) -> Candidate | None:
        ended = [c for c in self.finalists if c.kind == kind and math.isfinite(c.loss)]
        return min(ended, key=lambda c: c.loss, default=None)
