import math

import pytest

from foam_lightning.plan import FoldPlan, Levers
from tuner.finals import Candidate, Kind, decide
from tuner.objective import ShortRun

BATCHES = 8


def candidate(kind: Kind, level: int, loss: float, state_bytes: int) -> Candidate:
    """Make a finalist; gaps of up to about .02 are within the deviation between seeds."""
    levels = {"a": level, "b": level if kind != "mixed" else level + 1}
    plan = FoldPlan(
        model={},
        levels=levels,
        scales=dict.fromkeys(levels, 0.25),
        lr=0.01,
        levers=Levers(micro_batch_size=1),
    )
    run = ShortRun([loss * 100] * BATCHES, [100] * BATCHES)
    return Candidate(kind, plan, run, state_bytes)


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
    assert decide(finalists)[0] is finalists[winner]
    assert decide(finalists[::-1])[0] is finalists[winner]


def test_the_reason_names_who_was_close() -> None:
    _, reason = decide([adam(3.2), uniform(3.1), mixed(3.0)])
    assert reason == "mixed levels 2-3 is better than every other finalist beyond its interval"
    _, reason = decide([adam(3.2), mixed(3.0), uniform(3.01)])
    assert (
        reason
        == "uniform level 2 cannot be told from mixed levels 2-3, and is the simplest of them"
    )
    _, reason = decide([adam(3.03), uniform(3.0, 1), uniform(3.015, 2)])
    assert reason == "uniform level 1 alone is better than split-lr Adam beyond its interval"
    _, reason = decide([adam(3.01), uniform(3.0)])
    assert reason == "split-lr Adam fits, and nothing is better beyond its interval"
    _, reason = decide([uniform(3.0, 2), uniform(3.005, 3), mixed(3.01)])
    assert reason == (
        "uniform level 3 cannot be told from uniform level 2, mixed levels 2-3, and needs the "
        "fewest bytes among the simplest of them"
    )
