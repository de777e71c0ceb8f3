"""What each knob was worth: paired differences between the runs that a search made anyway."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

from tuner.trials.results import Candidate, SearchResult
from tuner.trials.runner import Difference, TrialResult, paired_difference

# Of a run: enough to see who leads when, few enough for many steps in each.
NUM_WINDOWS = 20


@dataclass(frozen=True)
class CurveWindow:
    """Some successive optimizer steps of two runs.

    Attributes:
        first: The first step, counted from 1.
        last: The last step.
        difference: Of the mean training losses, in nats per token; below zero the first plan leads.
    """

    first: int
    last: int
    difference: Difference


def paired_loss_curve(
    runs: Sequence[TrialResult], others: Sequence[TrialResult], num_windows: int = NUM_WINDOWS
) -> list[CurveWindow]:
    """Compare the training losses of two plans along the run.

    At each step both saw the same batch, which is what an evaluation batch is to
    `paired_difference`; so the interval has the same meaning as elsewhere: the spread over the
    steps of the window, and that between seeds.

    Args:
        runs: The first plan's runs, one per seed.
        others: The other plan's, same seeds in the same order.
        num_windows: How many windows to cut the run into, of equal length but for a step; of a run
            of fewer steps every step is one.

    Returns:
        The windows, first to last; none where a curve was not kept.

    Raises:
        ValueError: The runs do not pair.
    """
    lengths = {len(run.curve) for run in (*runs, *others)}
    if len(lengths) > 1:
        raise ValueError(f"runs of {', '.join(map(str, sorted(lengths)))} steps do not pair")
    num_steps = lengths.pop() if lengths else 0
    count = min(num_windows, num_steps)
    edges = [num_steps * i // count for i in range(count + 1)] if count else []
    return [
        CurveWindow(
            first + 1,
            last,
            paired_difference(
                [_part(run, first, last) for run in runs],
                [_part(run, first, last) for run in others],
            ),
        )
        for first, last in pairwise(edges)
    ]


def _part(run: TrialResult, first: int, last: int) -> TrialResult:
    """Take steps for evaluation batches; every batch of training has as many tokens."""
    return TrialResult(run.curve[first:last], [1] * (last - first))


# Plans are at equal bytes within half a level, which is a factor of the root of two.
_HALF_A_LEVEL = 0.5


@dataclass(frozen=True)
class Ablation:
    """What turning one knob did.

    Attributes:
        knob: What was turned, in a few words.
        setting: The best run with it turned.
        against: The run with it left alone.
        difference: How much more the former loses, so below zero the turn was worth it.
        num_tried: Of how many runs `setting` is the best; they are judged by the same losses, so
            among several the best looks better than it is.
        steps: Optimizer steps of each run.
        num_seeds: Seeds that both ran on.
    """

    knob: str
    setting: str
    against: str
    difference: Difference
    num_tried: int
    steps: int
    num_seeds: int


class _Stateful(Protocol):
    @property
    def state_bytes(self) -> int: ...


_T = TypeVar("_T", bound=_Stateful)


def at_equal_bytes(num_bytes: int, others: Sequence[_T]) -> list[_T]:
    """Pick those whose state is nearest to so many bytes, and within half a level of them."""

    def distance(other: _T) -> float:
        return abs(math.log2(other.state_bytes / num_bytes))

    nearest = min(map(distance, others), default=math.inf)
    return [o for o in others if distance(o) == nearest <= _HALF_A_LEVEL]


def ablations(search_result: SearchResult) -> list[Ablation]:
    """Compare the runs of a search knob by knob, first the short ones, then the finals.

    The knobs are learning rate and scales (against those of the settings, level by level), the
    level (the best run of each against the best of Adam; without one, of the best level), and
    levels by matrix (the best mixed plan against the best of one level at equal bytes).

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
        turned = [run for run in runs if not run.is_configured]
        asked = [run for run in runs if run.is_configured]
        if turned and asked:
            yield _compared(f"lr and scales, {_name(level)}", turned, asked[0], steps)
    best = {level: _best(runs) for level, runs in sorted(by_level.items())}
    if best:
        base = 0 if 0 in best else min(best, key=lambda level: best[level].loss)
        for level in best:
            if level != base:
                knob = f"{_name(level)} instead of {_name(base)}"
                yield _compared(knob, by_level[level], best[base], steps)
    mixed = [c for c in candidates if c.kind == "mixed"]
    folded = [c for level, runs in by_level.items() if level for c in runs]
    equal = at_equal_bytes(_best(mixed).state_bytes, folded) if mixed else []
    if equal:
        uniform = _best(equal)
        knob = f"levels by matrix instead of {_name(_level(uniform))}"
        yield _compared(knob, mixed, uniform, steps)


def _compared(knob: str, tried: Sequence[Candidate], other: Candidate, steps: int) -> Ablation:
    one = _best(tried)
    both = min(len(one.runs), len(other.runs))
    return Ablation(knob, one.label, other.label, one.against(other), len(tried), steps, both)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.loss)


def _level(uniform: Candidate) -> int:
    return next(iter(uniform.plan.levels.values()))


def _name(level: int) -> str:
    return f"level {level}" if level else "Adam"
