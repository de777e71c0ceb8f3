"""The finals: a race of a few plans over seeds, which the evidence tells apart, and who wins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tuner.trials.results import Candidate, Kind, Predict
from tuner.trials.runner import TrialResult

_SIMPLICITY: tuple[Kind, ...] = ("reference", "uniform", "mixed")


def race(
    candidates: Sequence[Candidate],
    run: Callable[[Sequence[Candidate], int], Sequence[TrialResult]],
    num_rounds: int,
) -> list[Candidate]:
    """Run all candidates, then again those that are still in the race, until one is left.

    Args:
        candidates: At least one, without runs.
        run: Gives the runs of candidates in a round, counted from 0; each round is one seed.
        num_rounds: Rounds at most, 1 or more.

    Returns:
        The candidates with their runs, in the order given.
    """
    racing = list(range(len(candidates)))
    found = list(candidates)
    for number in range(num_rounds):
        runs = run([found[i] for i in racing], number)
        for i, one in zip(racing, runs, strict=True):
            found[i] = replace(found[i], runs=[*found[i].runs, one])
        leader = min((found[i] for i in racing), key=_finite_first)
        racing = [i for i in racing if math.isfinite(found[i].loss) and not leader.beats(found[i])]
        if len(racing) < 2:
            break
    return found


def decide(
    finalists: Sequence[Candidate], predict: Predict, *, adam_may_win: bool = True
) -> tuple[Candidate, str]:
    """Choose the winner: a plan that is better than Adam for sure, and of those the simplest.

    Adam, where it fits, is displaced only by a plan whose own interval says that it is better. Of
    the plans that may displace it, those that cannot be told from the one of lowest loss tie; a
    tie goes to the simplest (uniform before mixed), then to fewer bytes. One that diverged never
    wins, unless all did.

    Args:
        finalists: At least one that may win, with runs.
        predict: Says of a gap between these runs what it will be on the full run.
        adam_may_win: Whether Adam may win; otherwise it is there to be compared with.

    Returns:
        The winner, and why it won.
    """
    able = [c for c in finalists if adam_may_win or c.kind != "reference"]
    able = [c for c in able if math.isfinite(c.loss)] or able
    references = [c for c in able if c.kind == "reference"]
    adam = min(references, key=_finite_first, default=None)
    better = [c for c in able if adam is None or c.beats(adam, predict)]
    if not better:
        assert adam is not None
        return adam, "split-lr Adam fits, and nothing is better beyond its interval"
    best = min(better, key=_finite_first)
    tied = [c for c in better if c is best or not best.beats(c, predict)]
    winner = min(tied, key=lambda c: (_SIMPLICITY.index(c.kind), c.state_bytes, c.loss))
    if len(tied) > 1:
        others = ", ".join(c.label for c in tied if c is not winner)
        why = (
            "is the simplest of them"
            if all(c.kind != winner.kind for c in tied if c is not winner)
            else "needs the fewest bytes among the simplest of them"
        )
        return winner, f"{winner.label} cannot be told from {others}, and {why}"
    if len(able) == 1:
        return winner, f"{winner.label} alone fits and came to its end"
    if all(winner.beats(c, predict) for c in able if c is not winner):
        return winner, f"{winner.label} is better than every other finalist beyond its interval"
    return winner, f"{winner.label} alone is better than split-lr Adam beyond its interval"


def _finite_first(candidate: Candidate) -> tuple[bool, float]:
    return not math.isfinite(candidate.loss), candidate.loss
