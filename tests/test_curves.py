import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.report.ablation import paired_loss_curve
from tuner.trials.runner import SEED_DEVIATION, TrialResult

LOSSES = st.floats(min_value=0, max_value=20)


def run(curve: list[float]) -> TrialResult:
    return TrialResult([3.0], [1], curve)


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=60), st.integers(1, 25))
def test_the_windows_part_the_run_and_their_means_are_those_of_the_gaps(
    pairs: list[tuple[float, float]], num_windows: int
) -> None:
    gaps = [one - other for one, other in pairs]
    one, other = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    windows = paired_loss_curve([run(one)], [run(other)], num_windows)
    assert len(windows) == min(num_windows, len(pairs))
    steps = [step for w in windows for step in range(w.first, w.last + 1)]
    assert steps == list(range(1, len(pairs) + 1))
    lengths = {window.last - window.first + 1 for window in windows}
    assert max(lengths) - min(lengths) <= 1
    for window in windows:
        within = gaps[window.first - 1 : window.last]
        assert window.difference.mean == pytest.approx(sum(within) / len(within), abs=1e-9)
        assert window.difference.half_width >= 1.95 * SEED_DEVIATION


def test_a_batch_that_is_hard_for_both_makes_no_noise() -> None:
    hard = [3 + math.sin(7 * step) for step in range(200)]
    easier = [loss - 0.1 for loss in hard]
    for window in paired_loss_curve([run(easier)], [run(hard)]):
        assert window.difference.mean == pytest.approx(-0.1)
        assert window.difference.half_width == pytest.approx(1.96 * SEED_DEVIATION)


def test_another_seed_narrows_the_band() -> None:
    low, high = run([3.0] * 40), run([3.1] * 40)
    (one,) = paired_loss_curve([low], [high], 1)
    (two,) = paired_loss_curve([low, low], [high, high], 1)
    assert two.difference.mean == pytest.approx(one.difference.mean)
    assert two.difference.half_width < one.difference.half_width


def test_no_curve_gives_no_windows_and_curves_that_do_not_pair_are_refused() -> None:
    assert paired_loss_curve([run([])], [run([])]) == []
    with pytest.raises(ValueError, match="runs of 2, 3 steps do not pair"):
        paired_loss_curve([run([3.0] * 3)], [run([3.0] * 2)])
