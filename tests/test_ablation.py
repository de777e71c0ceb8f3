from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.search_results import (
    ADAM_WINS,
    ALL_DIVERGED,
    MIXED,
    NO_REFERENCE,
    SEARCHED,
    TUNED,
    UNIFORM,
    outcome_of,
)
from tuner.report.ablation import Ablation, ablations, at_equal_bytes

SHORT, FINAL = 160, 320


def found(worths_: list[Ablation], steps: int) -> dict[str, Ablation]:
    return {worth.knob: worth for worth in worths_ if worth.steps == steps}


def test_short_runs_say_what_each_knob_was_worth() -> None:
    short = found(ablations(TUNED), SHORT)
    means = {knob: round(worth.difference.mean, 4) for knob, worth in short.items()}
    assert means == {
        "lr and scales, Adam": -0.015,
        "lr and scales, level 2": -0.024,
        "level 1 instead of Adam": -0.045,
        "level 2 instead of Adam": -0.058,
        "level 3 instead of Adam": -0.018,
        "level 8 instead of Adam": 0.011,
        "levels by matrix instead of level 2": -0.017,
    }
    assert all(worth.num_seeds == 1 for worth in short.values())


def test_finals_are_compared_on_the_seeds_that_both_ran_on() -> None:
    finals = found(ablations(TUNED), FINAL)
    means = {knob: round(worth.difference.mean, 4) for knob, worth in finals.items()}
    assert means == {
        "lr and scales, Adam": -0.02,  # 3.47 against 3.49 on the one seed of the latter
        "level 2 instead of Adam": -0.06,
        "level 3 instead of Adam": -0.0835,
        "levels by matrix instead of level 2": -0.04,
    }
    assert {knob: worth.num_seeds for knob, worth in finals.items()} == {
        "lr and scales, Adam": 1,
        "level 2 instead of Adam": 2,
        "level 3 instead of Adam": 2,
        "levels by matrix instead of level 2": 2,
    }


def test_it_says_of_how_many_runs_the_best_is_one() -> None:
    short = found(ablations(TUNED), SHORT)
    assert short["lr and scales, Adam"].num_tried == 2
    assert short["levels by matrix instead of level 2"].num_tried == 3
    assert short["levels by matrix instead of level 2"].setting == "mixed 1"
    assert short["lr and scales, level 2"].num_tried == 1  # the other one diverged
    assert short["lr and scales, level 2"].against == "uniform level 2, lr 0.02, scale 0.25"


def test_without_adam_levels_are_compared_with_the_best_one() -> None:
    short = found(ablations(NO_REFERENCE), SHORT)
    assert list(short) == ["level 3 instead of level 2", "level 8 instead of level 2"]
    assert all(worth.difference.mean > 0 for worth in short.values())


def test_without_the_settings_themselves_nothing_says_what_turning_them_was_worth() -> None:
    searched = [replace(run, is_configured=False) for run in SEARCHED]
    finalists = [replace(c, is_configured=False) for c in TUNED.finalists]
    found_ = ablations(replace(TUNED, trials=searched, finalists=finalists))
    assert not any(worth.knob.startswith("lr and scales") for worth in found_)


def test_what_diverged_is_compared_with_nothing() -> None:
    assert ablations(ALL_DIVERGED) == []
    assert ablations(ADAM_WINS) == []


def test_mixed_plans_are_compared_at_equal_bytes_alone() -> None:
    half = replace(MIXED, state_bytes=2 * MIXED.state_bytes)
    searched = [run for run in SEARCHED if run.level is not None]
    knobs = [w.knob for w in ablations(outcome_of(half, UNIFORM, trials=searched))]
    assert not any(knob.startswith("levels by matrix") for knob in knobs)


@given(st.integers(1, 10**12), st.lists(st.integers(1, 10**12), max_size=9))
def test_equal_bytes_are_the_nearest_within_half_a_level(num_bytes: int, others: list[int]) -> None:
    candidates = [replace(UNIFORM, state_bytes=size) for size in others]
    equal = [c.state_bytes for c in at_equal_bytes(num_bytes, candidates)]
    assert all(2**-0.501 <= size / num_bytes <= 2**0.501 for size in equal)
    if any(2**-0.499 <= size / num_bytes <= 2**0.499 for size in others):
        ratios = [max(size / num_bytes, num_bytes / size) for size in others]
        assert equal
        assert max(equal[0] / num_bytes, num_bytes / equal[0]) == pytest.approx(min(ratios))
