"""The result of a search: every short run, the finalists, and the winner."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from foam_lightning.plan import FoldPlan
from tuner.trials.budget import SearchBudget
from tuner.trials.runner import Difference, TrialResult, paired_difference

Kind = Literal["reference", "uniform", "mixed"]
# Predicts a difference on the full run from the measured one, and whether it is one to Adam.
Predict = Callable[[Difference, bool], Difference]


@dataclass(frozen=True)
class Candidate:
    """A plan that may win.

    Attributes:
        kind: "reference" is Adam, "uniform" one level, "mixed" a level per matrix.
        label: A name for tables, unique among the candidates.
        plan: The plan.
        state_bytes: Bytes of both moments of every parameter that folds.
        runs: Its final runs, one per seed; fewer if it dropped out of the race.
        is_configured: Whether learning rate and scales are those of the settings.
    """

    kind: Kind
    label: str
    plan: FoldPlan
    state_bytes: int
    runs: Sequence[TrialResult] = field(default_factory=list)
    is_configured: bool = False

    @property
    def loss(self) -> float:
        """Mean loss over the seeds; NaN if a run diverged, or without runs."""
        return math.fsum(run.loss for run in self.runs) / len(self.runs) if self.runs else math.nan

    def against(self, other: "Candidate") -> Difference:
        """Compare with another candidate on the seeds that both ran."""
        num_seeds = min(len(self.runs), len(other.runs))
        return paired_difference(self.runs[:num_seeds], other.runs[:num_seeds])

    def expected(self, other: "Candidate", predict: Predict) -> Difference:
        """Predict the difference to another candidate on the full run."""
        to_adam = (self.kind == "reference") != (other.kind == "reference")
        return predict(self.against(other), to_adam)

    def beats(self, other: "Candidate", predict: Predict = lambda gap, _: gap) -> bool:
        """Whether it is significantly better, as measured or as predicted for the full run."""
        difference = self.expected(other, predict)
        return difference.is_decided and difference.mean < 0


@dataclass(frozen=True)
class TrialRecord:
    """One short run of the search, for the report.

    Attributes:
        stage: "uniform" or "mixed".
        description: What was tried.
        plan: The plan; all short runs have one seed, so that any two can be paired.
        run: The result.
        state_bytes: Bytes of the moments of the matrices that fold.
        is_configured: Whether learning rate and scales are those of the settings.
    """

    stage: str
    description: str
    plan: FoldPlan
    run: TrialResult
    state_bytes: int
    is_configured: bool

    @property
    def level(self) -> int | None:
        """The uniform level, None for a mixed plan."""
        levels = set(self.plan.levels.values())
        return levels.pop() if len(levels) == 1 else None

    @property
    def loss(self) -> float | None:
        """Validation loss in nats per token; None if the run diverged."""
        return self.run.loss if math.isfinite(self.run.loss) else None


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        winner: The plan to train by.
        finalists: All that ran in the finals, including the winner.
        trials: Every short run of the search.
        adam_state_bytes: Bytes of the moments of the matrices that fold, at level 0.
        budget: Number and length of the runs.
        reason: Why the winner won, as a phrase that starts with its label.
    """

    winner: Candidate
    finalists: Sequence[Candidate]
    trials: Sequence[TrialRecord]
    adam_state_bytes: int
    budget: SearchBudget
    reason: str

    @property
    def reference(self) -> Candidate | None:
        """The best Adam of the finals; None if all of its runs diverged."""
        return self._best("reference")

    @property
    def baseline(self) -> Candidate:
        """The plan that others are compared with: Adam, or the best uniform plan, or the winner."""
        return self.reference or self._best("uniform") or self.winner

    def loss_of(self, kind: Kind) -> float | None:
        """Return the lowest final loss of a kind; None if all diverged."""
        best = self._best(kind)
        return None if best is None else best.loss

    def _best(self, kind: Kind) -> Candidate | None:
        ended = [c for c in self.finalists if c.kind == kind and math.isfinite(c.loss)]
        return min(ended, key=lambda c: c.loss, default=None)
