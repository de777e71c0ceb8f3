import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.search.finals import decide, race
from tuner.trials.extrapolation import predict_full_run
from tuner.trials.results import Candidate, Kind
from tuner.trials.runner import Difference, TrialResult


def result(loss: float) -> TrialResult:
    return TrialResult([loss * 100] * 8, [100] * 8)


def candidate(kind: Kind, label: str, level: int, loss: float, state_bytes: int) -> Candidate:
    """Make a finalist; differences of up to about 0.02 are not significant."""
    plan = FoldPlan(
        model={},
        levels={"a": level, "b": level + (kind == "mixed")},
        scales={"a": 0.25, "b": 0.25},
        lr=0.01,
        memory_options=MemoryOptions(micro_batch_size=1),
    )
    return Candidate(kind, label, plan, state_bytes, [result(loss)])


def as_measured(difference: Difference, to_adam: bool) -> Difference:
    return difference


def adam(loss: float) -> Candidate:
    return candidate("reference", "split-lr Adam", 0, loss, 100)


def uniform(loss: float, level: int = 2) -> Candidate:
    return candidate("uniform", f"uniform level {level}", level, loss, 100 // 2**level)


def mixed(loss: float, state_bytes: int = 25) -> Candidate:
    return candidate("mixed", "mixed levels 2-3", 2, loss, state_bytes)


CASES = {
    "clearly best": ([adam(3.2), uniform(3.1), mixed(3.0)], 2, "better than every other"),
    "tie of all": ([mixed(3.0), uniform(3.005), adam(3.01)], 2, "no plan is"),
    "tie of two": ([adam(3.2), mixed(3.0), uniform(3.01)], 2, "mixed levels 2-3, and the simplest"),
    "fewer bytes": ([uniform(3.0, 2), uniform(3.005, 3), mixed(3.01)], 1, "fewest bytes"),
    "fewer bytes, worse": ([uniform(3.0, 2), uniform(3.05, 3)], 0, "better than every other"),
    "simpler before fewer bytes": ([uniform(3.01, 1), mixed(3.0, 10)], 0, "the simplest"),
    "only one better than Adam": ([adam(3.03), uniform(3.0, 1), uniform(3.015)], 1, "the only"),
    "none better than Adam": ([adam(3.01), uniform(3.0), mixed(3.002)], 0, "no plan is"),
    "alone": ([uniform(3.0)], 0, "only plan that fits"),
    "one diverged": ([adam(math.nan), uniform(3.0)], 1, "only plan that fits"),
    "the first diverged": ([adam(math.inf), mixed(3.0), uniform(3.001)], 2, "the simplest"),
    "all diverged": ([adam(math.nan)], 0, ""),
    "two Adams": ([adam(3.1), adam(3.0), uniform(3.05)], 1, "no plan is"),
}


@pytest.mark.parametrize(("finalists", "number", "why"), CASES.values(), ids=CASES.keys())
def test_the_simplest_of_the_plans_that_hardly_differ_wins(
    finalists: list[Candidate], number: int, why: str
) -> None:
    winner, reason = decide(finalists, as_measured)
    assert winner is finalists[number]
    assert reason.startswith(f"{winner.label}: ")
    assert why in reason
    assert decide(finalists[::-1], as_measured)[0] is winner


def test_adam_that_does_not_fit_never_wins() -> None:
    finalists = [adam(3.0), uniform(3.1, 1), uniform(3.105, 2)]
    assert decide(finalists, as_measured)[0] is finalists[0]
    winner, reason = decide(finalists, as_measured, adam_may_win=False)
    assert winner is finalists[2]
    assert "Adam" not in reason
    assert decide(finalists[:2], as_measured, adam_may_win=False)[0] is finalists[1]


def run_race(losses: list[list[float]], num_rounds: int) -> tuple[list[int], list[list[int]]]:
    """Race plans of these losses by round; return how often each ran, and which in each round."""
    candidates = [replace(uniform(0.0, level), runs=[]) for level in range(len(losses))]
    rounds: list[list[int]] = []

    def run_round(racing: Sequence[Candidate], number: int) -> list[TrialResult]:
        rounds.append([candidates.index(replace(c, runs=[])) for c in racing])
        return [result(losses[i][number]) for i in rounds[-1]]

    found = race(candidates, run_round, num_rounds)
    assert [replace(c, runs=[]) for c in found] == candidates
    return [len(c.runs) for c in found], rounds


def test_candidates_significantly_worse_than_the_leader_drop_out() -> None:
    losses = [[3.0, 3.0, 3.0], [3.01, 3.01, 3.0], [3.1, 3.1, 3.1], [3.015, 3.06, 3.0]]
    assert run_race(losses, 3) == ([3, 3, 1, 2], [[0, 1, 2, 3], [0, 1, 3], [0, 1]])
    assert run_race(losses, 1) == ([1, 1, 1, 1], [[0, 1, 2, 3]])
    assert run_race([[3.2, 3.2], [3.0, 3.0]], 2) == ([1, 1], [[0, 1]])


def test_a_candidate_that_diverges_drops_out() -> None:
    assert run_race([[math.nan, 3.0], [3.2, 3.2], [3.21, 3.2]], 2)[0] == [1, 2, 2]
    assert run_race([[math.nan, 3.0]], 2)[0] == [1]


def test_a_difference_that_vanishes_on_the_full_run_decides_nothing() -> None:
    finalists = [adam(3.03), uniform(3.02), mixed(2.995)]
    assert decide(finalists, as_measured)[0] is finalists[2]
    predict = partial(predict_full_run, num_steps=300, full_steps=1200)
    assert decide(finalists, predict)[0] is finalists[0]
    assert decide(finalists, predict, adam_may_win=False)[0] is finalists[1]
    assert decide([adam(3.2), *finalists[1:]], predict)[0] is finalists[1]
