"""The finals: candidates run on one seed after another until one is left, and the decision."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tuner.trials.budget import SearchBudget
from tuner.trials.cache import CachedRunner
from tuner.trials.results import Candidate, Kind, Predict
from tuner.trials.runner import TrialResult
from tuner.trials.study import Study

_SIMPLEST_FIRST: tuple[Kind, ...] = ("reference", "uniform", "mixed")


def run_finals(
    candidates: Sequence[Candidate],
    study: Study,
    runner: CachedRunner,
    search_budget: SearchBudget,
) -> list[Candidate]:
    """Race the candidates in long runs, on a new seed in every round.

    Args:
        candidates: At least one, without runs.
        study: Records the runs, and shares them between workers.
        runner: Runs them.
        search_budget: Their length, and the number of seeds.

    Returns:
        The candidates with their runs, in the order given.
    """
    steps = search_budget.final_steps

    def run_round(racing: Sequence[Candidate], number: int) -> list[TrialResult]:
        seed = runner.job.seed + 1 + number
        keys = [runner.key(c.plan, steps, seed) for c in racing]
        by_key = dict(zip(keys, racing, strict=True))

        def report(key: str, result: TrialResult) -> None:
            candidate = by_key[key]
            description = f"final, seed {seed}: {candidate.label}"
            runner.report(description, candidate.plan, steps, seed, result)

        found = study.run_named(
            list(by_key), lambda key: runner.run(by_key[key].plan, steps, seed), report
        )
        return [found[key] for key in keys]

    return race(candidates, run_round, search_budget.num_seeds)


def race(
    candidates: Sequence[Candidate],
    run_round: Callable[[Sequence[Candidate], int], Sequence[TrialResult]],
    num_rounds: int,
) -> list[Candidate]:
    """Run all candidates, then again those that are still in the race, until one is left.

    A candidate drops out when it diverges or is significantly worse than the leader.

    Args:
        candidates: At least one, without runs.
        run_round: Runs candidates in a round, counted from 0, and returns a result for each.
        num_rounds: Largest number of rounds, 1 or more.

    Returns:
        The candidates with their runs, in the order given.
    """
    racing = list(range(len(candidates)))
    found = list(candidates)
    for number in range(num_rounds):
        results = run_round([found[i] for i in racing], number)
        for i, result in zip(racing, results, strict=True):
            found[i] = replace(found[i], runs=[*found[i].runs, result])
        leader = min((found[i] for i in racing), key=_finite_first)
        racing = [i for i in racing if math.isfinite(found[i].loss) and not leader.beats(found[i])]
        if len(racing) < 2:
            break
    return found


def decide(
    finalists: Sequence[Candidate], predict: Predict, *, adam_may_win: bool = True
) -> tuple[Candidate, str]:
    """Choose the winner: the simplest of the plans that are significantly better than Adam.

    If Adam fits and no plan is significantly better, Adam wins. Otherwise the plans better than
    Adam that are not significantly worse than the best of them tie. A tie goes to the simplest
    (uniform before mixed), then to fewer bytes. A plan that diverged wins only if all did.

    Args:
        finalists: With runs; at least one may win.
        predict: Predicts the difference between two plans on the full run from that of these runs.
        adam_may_win: Whether Adam may win; if not, it only serves as the reference.

    Returns:
        The winner, and the reason as a phrase that starts with its label.
    """
    able = [c for c in finalists if adam_may_win or c.kind != "reference"]
    able = [c for c in able if math.isfinite(c.loss)] or able
    adam = min((c for c in able if c.kind == "reference"), key=_finite_first, default=None)
    better = [c for c in able if adam is None or c.beats(adam, predict)]
    if not better:
        assert adam is not None
        return adam, "split-lr Adam: fits the budget, and no plan is significantly better"
    best = min(better, key=_finite_first)
    tied = [c for c in better if c is best or not best.beats(c, predict)]
    winner = min(tied, key=lambda c: (_SIMPLEST_FIRST.index(c.kind), c.state_bytes, c.loss))
    others = [c for c in tied if c is not winner]
    if others:
        is_simplest = all(c.kind != winner.kind for c in others)
        reason = (
            "the simplest of them" if is_simplest else "of the simplest the one of fewest bytes"
        )
        labels = ", ".join(c.label for c in others)
        return winner, f"{winner.label}: not significantly different from {labels}, and {reason}"
    if len(able) == 1:
        return winner, f"{winner.label}: the only plan that fits and did not diverge"
    if all(winner.beats(c, predict) for c in able if c is not winner):
        return winner, f"{winner.label}: significantly better than every other finalist"
    return winner, f"{winner.label}: the only plan significantly better than split-lr Adam"


def _finite_first(candidate: Candidate) -> tuple[bool, float]:
    return not math.isfinite(candidate.loss), candidate.loss
