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

BATCHES = 8


def candidate(kind: Kind, level: int, loss: float, state_bytes: int) -> Candidate:
    """Make a finalist; gaps of up to about .02 are within the deviation between seeds."""
    levels = {"a": level, "b": level if kind != "mixed" else level + 1}
    plan = FoldPlan(
        model={},
        levels=levels,
        scales=dict.fromkeys(levels, 0.25),
        lr=0.01,
        memory_options=MemoryOptions(micro_batch_size=1),
    )
    label = {
        "reference": "split-lr Adam",
        "uniform": f"uniform level {level}",
        "mixed": f"mixed levels {level}-{level + 1}",
    }[kind]
    return Candidate(kind, label, plan, state_bytes, [run_at(loss)])


def run_at(loss: float) -> TrialResult:
    return TrialResult([loss * 100] * BATCHES, [100] * BATCHES)


def as_measured(gap: Difference, to_adam: bool) -> Difference:
    return gap


def adam(loss: float) -> Candidate:
    return candidate("reference", 0, loss, 100)


def uniform(loss: float, level: int = 2) -> Candidate:
    return candidate("uniform", level, loss, 100 // 2**level)


def mixed(loss: float, state_bytes: int = 25) -> Candidate:
    return candidate("mixed", 2, loss, state_bytes)


CASES = {
    "clearly best": ([adam(3.2), uniform(3.1), mixed(3.0)], 2),
    "tie of all": ([mixed(3.0), uniform(3.005), adam(3.01)], 2),
    "tie of two": ([adam(3.2), mixed(3.0), uniform(3.01)], 2),
    "fewer bytes": ([uniform(3.0, 2), uniform(3.005, 3)], 1),
    "fewer bytes, worse": ([uniform(3.0, 2), uniform(3.05, 3)], 0),
    "simpler before fewer bytes": ([uniform(3.01, 1), mixed(3.0, 10)], 0),
    "not for sure better than Adam": ([adam(3.03), uniform(3.0, 1), uniform(3.015, 2)], 1),
    "nothing is better than Adam for sure": ([adam(3.01), uniform(3.0), mixed(3.002)], 0),
    "alone": ([uniform(3.0)], 0),
    "one diverged": ([adam(math.nan), uniform(3.0)], 1),
    "the first diverged, the rest tie": ([adam(math.inf), mixed(3.0), uniform(3.001)], 2),
    "all diverged": ([adam(math.nan)], 0),
}


@pytest.mark.parametrize(("finalists", "winner"), CASES.values(), ids=CASES.keys())
def test_the_simplest_of_those_that_cannot_be_told_apart_wins(
    finalists: list[Candidate], winner: int
) -> None:
    assert decide(finalists, as_measured)[0] is finalists[winner]
    assert decide(finalists[::-1], as_measured)[0] is finalists[winner]


def test_the_reason_names_who_was_close() -> None:
    _, reason = decide([adam(3.2), uniform(3.1), mixed(3.0)], as_measured)
    assert reason == "mixed levels 2-3 is better than every other finalist beyond its interval"
    _, reason = decide([adam(3.2), mixed(3.0), uniform(3.01)], as_measured)
    assert (
        reason
        == "uniform level 2 cannot be told from mixed levels 2-3, and is the simplest of them"
    )
    _, reason = decide([adam(3.03), uniform(3.0, 1), uniform(3.015, 2)], as_measured)
    assert reason == "uniform level 1 alone is better than split-lr Adam beyond its interval"
    _, reason = decide([adam(3.01), uniform(3.0)], as_measured)
    assert reason == "split-lr Adam fits, and nothing is better beyond its interval"
    _, reason = decide([uniform(3.0, 2), uniform(3.005, 3), mixed(3.01)], as_measured)
    assert reason == (
        "uniform level 3 cannot be told from uniform level 2, mixed levels 2-3, and needs the "
        "fewest bytes among the simplest of them"
    )


def test_adam_that_does_not_fit_never_wins() -> None:
    ahead = [adam(3.0), uniform(3.1, 1), uniform(3.105, 2)]
    assert decide(ahead, as_measured)[0] is ahead[0]
    winner, reason = decide(ahead, as_measured, adam_may_win=False)
    assert winner is ahead[2]
    assert "Adam" not in reason
    assert decide(ahead[:2], as_measured, adam_may_win=False) == (
        ahead[1],
        "uniform level 1 alone fits and came to its end",
    )


def test_the_better_of_two_adams_is_the_one_to_beat() -> None:
    worse, better = adam(3.1), adam(3.0)
    assert decide([worse, better, uniform(3.05)], as_measured)[0] is better


def raced(losses: list[list[float]], num_rounds: int) -> tuple[list[int], list[list[int]]]:
    """Race plans of these losses by round; give how often each ran, and who ran in each round."""
    entrants = [replace(uniform(0.0, level), runs=[]) for level in range(len(losses))]
    rounds: list[list[int]] = []

    def run(racing: Sequence[Candidate], number: int) -> list[TrialResult]:
        rounds.append([entrants.index(replace(c, runs=[])) for c in racing])
        return [run_at(losses[i][number]) for i in rounds[-1]]

    found = race(entrants, run, num_rounds)
    assert [replace(c, runs=[]) for c in found] == entrants
    return [len(c.runs) for c in found], rounds


def test_a_race_goes_on_with_those_that_the_leader_does_not_beat() -> None:
    losses = [[3.0, 3.0, 3.0], [3.01, 3.01, 3.0], [3.1, 3.1, 3.1], [3.015, 3.06, 3.0]]
    assert raced(losses, 3) == ([3, 3, 1, 2], [[0, 1, 2, 3], [0, 1, 3], [0, 1]])
    assert raced(losses, 1) == ([1, 1, 1, 1], [[0, 1, 2, 3]])


def test_a_race_ends_when_one_is_left() -> None:
    assert raced([[3.2, 3.2], [3.0, 3.0]], 2) == ([1, 1], [[0, 1]])


def test_one_that_diverges_leaves_the_race() -> None:
    assert raced([[math.nan, 3.0], [3.2, 3.2], [3.21, 3.2]], 2)[0] == [1, 2, 2]
    assert raced([[math.nan, 3.0]], 2)[0] == [1]


def test_candidates_are_compared_on_the_seeds_that_both_ran() -> None:
    often = replace(uniform(0.0), runs=[run_at(3.0), run_at(3.5)])
    once = replace(uniform(0.0), runs=[run_at(3.1)])
    assert often.against(once).mean == pytest.approx(-0.1)
    assert often.loss == pytest.approx(3.25)
    assert often.beats(once)


def test_a_gap_that_the_full_run_will_not_show_decides_nothing() -> None:
    ahead = [adam(3.03), uniform(3.02), mixed(2.995)]
    assert decide(ahead, as_measured)[0] is ahead[2]
    shrunk = partial(predict_full_run, num_steps=300, full_steps=1200)
    assert decide(ahead, shrunk)[0] is ahead[0]
    assert decide(ahead, shrunk, adam_may_win=False)[0] is ahead[1]
    assert decide([adam(3.2), *ahead[1:]], shrunk)[0] is ahead[1]
