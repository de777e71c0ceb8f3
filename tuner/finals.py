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
    """Choose the winner: a plan that is better than Adam for sure, and of those the simplest.

    Adam, where it fits, is displaced only by a plan whose own interval says that it is better. Of
    the plans that may displace it, those that cannot be told from the one of lowest loss tie; a
    tie goes to the simplest (uniform before mixed), then to fewer bytes. One that diverged never
    wins, unless all did.

    Args:
        finalists: At least one, runs paired.

    Returns:
        The winner, and why it won.
    """
    finalists = [c for c in finalists if math.isfinite(c.run.loss)] or finalists
    adam = next((c for c in finalists if c.kind == "reference"), None)
    better = [c for c in finalists if adam is None or _is_better(c, adam)]
    if not better:
        best = min(finalists, key=lambda c: c.run.loss)
        return adam or best, "split-lr Adam fits, and nothing is better beyond its interval"
    best = min(better, key=lambda c: c.run.loss)
    tied = [c for c in better if c is best or not _is_better(best, c)]
    winner = min(tied, key=lambda c: (_SIMPLICITY.index(c.kind), c.state_bytes, c.run.loss))
    if len(tied) > 1:
        others = ", ".join(c.label for c in tied if c is not winner)
        why = (
            "is the simplest of them"
            if all(c.kind != winner.kind for c in tied if c is not winner)
            else "needs the fewest bytes among the simplest of them"
        )
        return winner, f"{winner.label} cannot be told from {others}, and {why}"
    if all(_is_better(winner, c) for c in finalists if c is not winner):
        return winner, f"{winner.label} is better than every other finalist beyond its interval"
    return winner, f"{winner.label} alone is better than split-lr Adam beyond its interval"


def _is_better(one: Candidate, other: Candidate) -> bool:
    difference = paired_difference([one.run], [other.run])
    return difference.is_decided and difference.mean < 0
