"""The finals: which of a few plans the evidence tells apart, and which one wins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foam_lightning.plan import FoldPlan
from tuner.objective import ShortRun, paired_difference

Kind = Literal["reference", "uniform", "mixed"]
_SIMPLICITY: tuple[Kind, ...] = ("reference", "uniform", "mixed")


@dataclass(frozen=True)
class Candidate:
    """A plan that may win.

    Attributes:
        kind: "reference" is Adam at its best, "uniform" one level, "mixed" a level per matrix.
        plan: The plan.
        run: Its final run.
        state_bytes: Of both moments of every parameter that folds.
    """

    kind: Kind
    plan: FoldPlan
    run: ShortRun
    state_bytes: int

    @property
    def label(self) -> str:
        """A name for tables."""
        levels = set(self.plan.levels.values())
        if self.kind == "uniform":
            return f"uniform level {levels.pop()}"
        if self.kind == "mixed":
            return f"mixed levels {min(levels)}-{max(levels)}"
        return "split-lr Adam"


def decide(finalists: Sequence[Candidate]) -> tuple[Candidate, str]:
    """Choose the winner: the best one that the evidence tells apart, else the simplest.

    Of all finalists that the interval does not tell from the one of lowest loss, the simplest
    wins (Adam before uniform before mixed), then the one with fewer bytes. One that diverged never
    wins, unless all did.

    Args:
        finalists: At least one, runs paired.

    Returns:
        The winner, and why it won.
    """
    finalists = [c for c in finalists if math.isfinite(c.run.loss)] or finalists
    best = min(finalists, key=lambda c: c.run.loss)
    tied = [
        c for c in finalists if c is best or not paired_difference([c.run], [best.run]).is_decided
    ]
    winner = min(tied, key=lambda c: (_SIMPLICITY.index(c.kind), c.state_bytes, c.run.loss))
    if winner is best and len(tied) == 1:
        return winner, f"{winner.label} is better than every other finalist beyond its interval"
    others = ", ".join(c.label for c in tied if c is not winner)
    why = (
        "is the simplest of them"
        if all(c.kind != winner.kind for c in tied if c is not winner)
        else "needs the fewest bytes among the simplest of them"
    )
    return winner, f"{winner.label} cannot be told from {others}, and {why}"
