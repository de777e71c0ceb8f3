"""What each choice of the search changed, from runs that it made anyway, compared in pairs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tuner.trials.results import Candidate, SearchResult
from tuner.trials.runner import Difference, TrialResult, paired_difference

# Fine enough to show when a plan takes the lead, coarse enough to average over many steps.
NUM_WINDOWS = 20
# Plans count as equal in bytes within half a level, a factor of the square root of 2.
_HALF_A_LEVEL = 0.5


@dataclass(frozen=True)
class CurveWindow:
    """A range of optimizer steps, over which two runs are compared.

    Attributes:
        first: The first step, counted from 1.
        last: The last step, included.
        difference: First plan minus second, mean training loss in nats per token.
    """

    first: int
    last: int
    difference: Difference


def paired_loss_curve(
    runs: Sequence[TrialResult], others: Sequence[TrialResult], num_windows: int = NUM_WINDOWS
) -> list[CurveWindow]:
    """Compare the training losses of two plans over the course of the run.

    At each step both plans see the same batch, so a step pairs as an evaluation batch does in
    `paired_difference`, and the interval has the same meaning.

    Args:
        runs: The first plan's runs, one per seed.
        others: The other plan's runs, same seeds in the same order.
        num_windows: Windows to split the run into, of equal length within a step; a shorter run
            has a window per step.

    Returns:
        The windows, first to last; none if the runs have no training curve.

    Raises:
        ValueError: The runs have different lengths or seeds.
    """
    lengths = {len(run.curve) for run in (*runs, *others)}
    if len(lengths) > 1:
        raise ValueError(f"runs of {', '.join(map(str, sorted(lengths)))} steps do not pair")
    num_steps = lengths.pop() if lengths else 0
    count = min(num_windows, num_steps)
    edges = [num_steps * i // count for i in range(count + 1)] if count else []

    def window_of(run: TrialResult, first: int, last: int) -> TrialResult:
        return TrialResult(run.curve[first:last], [1] * (last - first))

    windows = []
    for first, last in pairwise(edges):
        pair = ([window_of(run, first, last) for run in some] for some in (runs, others))
        windows.append(CurveWindow(first + 1, last, paired_difference(*pair)))
    return windows


@dataclass(frozen=True)
class Ablation:
    """What one choice of the search changed.

    Attributes:
        choice: What was chosen, in a few words.
        chosen: The best run with the choice.
        baseline: The run without it.
        difference: Loss of the former minus that of the latter; below zero the choice helped.
        num_tried: How many runs `chosen` is the best of; picking the best by the same losses
            makes it look better than it is.
        steps: Optimizer steps of each run.
        num_seeds: Seeds on which both ran.
    """

    choice: str
    chosen: str
    baseline: str
    difference: Difference
    num_tried: int
    steps: int
    num_seeds: int


def at_equal_bytes(num_bytes: int, others: Sequence[Candidate]) -> list[Candidate]:
    """Select those whose state is closest to `num_bytes`, if it is within half a level of it."""

    def distance(other: Candidate) -> float:
        return abs(math.log2(other.state_bytes / num_bytes))

    nearest = min(map(distance, others), default=math.inf)
    return [o for o in others if distance(o) == nearest <= _HALF_A_LEVEL]


def ablations(search_result: SearchResult) -> list[Ablation]:
    """Compare the runs of a search choice by choice, the short runs first, then the finals.

    The choices are the learning rate and scales (against the configured ones, at each level), the
    level (the best run of each against the best Adam, or without Adam against the best level), and
    a level per matrix (the best mixed plan against the best uniform plan at equal bytes).

    Args:
        search_result: What was run.
    """
    short = [
        Candidate(
            "mixed" if run.level is None else "uniform" if run.level else "reference",
            run.description,
            run.plan,
            run.state_bytes,
            [run.run],
            run.is_configured,
        )
        for run in search_result.trials
    ]
    return [
        ablation
        for candidates, steps in (
            (short, search_result.budget.steps),
            (search_result.finalists, search_result.budget.final_steps),
        )
        for ablation in _ablations([c for c in candidates if math.isfinite(c.loss)], steps)
    ]


def _ablations(candidates: Sequence[Candidate], steps: int) -> Iterator[Ablation]:
    by_level: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.kind != "mixed":
            by_level.setdefault(_level(candidate), []).append(candidate)
    for level, runs in sorted(by_level.items()):
        tuned = [run for run in runs if not run.is_configured]
        configured = [run for run in runs if run.is_configured]
        if tuned and configured:
            yield _compare(f"tuned lr and scales, {_name(level)}", tuned, configured[0], steps)
    best = {level: _best(runs) for level, runs in sorted(by_level.items())}
    if best:
        base = 0 if 0 in best else min(best, key=lambda level: best[level].loss)
        for level in best:
            if level != base:
                choice = f"{_name(level)} instead of {_name(base)}"
                yield _compare(choice, by_level[level], best[base], steps)
    mixed = [c for c in candidates if c.kind == "mixed"]
    folded = [c for level, runs in by_level.items() if level for c in runs]
    equal = at_equal_bytes(_best(mixed).state_bytes, folded) if mixed else []
    if equal:
        uniform = _best(equal)
        choice = f"a level per matrix instead of {_name(_level(uniform))}"
        yield _compare(choice, mixed, uniform, steps)


def _compare(choice: str, tried: Sequence[Candidate], baseline: Candidate, steps: int) -> Ablation:
    best = _best(tried)
    num_seeds = min(len(best.runs), len(baseline.runs))
    difference = best.against(baseline)
    return Ablation(choice, best.label, baseline.label, difference, len(tried), steps, num_seeds)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.loss)


def _level(uniform: Candidate) -> int:
    return next(iter(uniform.plan.levels.values()))


def _name(level: int) -> str:
    return f"level {level}" if level else "Adam"
