import math
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from tests.support.search_results import (
    ADAM_STATE,
    ADAM_WINS,
    ALL_DIVERGED,
    HIGHER,
    MIXED,
    NO_REFERENCE,
    ONE_DIVERGED,
    REFERENCE,
    TRIALS,
    TUNED,
    UNIFORM,
    search_result_of,
)
from tuner.report.ablation import Ablation, ablations
from tuner.report.result_plots import draw_ablation, draw_curves, draw_losses
from tuner.trials.results import SearchResult
from tuner.trials.runner import Difference


def labels(figure: Figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.get_yticklabels()]


# ---- training curves


@pytest.mark.parametrize("search_result", [TUNED, NO_REFERENCE], ids=["Adam", "no Adam"])
def test_every_finalist_but_the_baseline_has_a_curve(search_result: SearchResult) -> None:
    baseline = search_result.baseline
    assert baseline is (REFERENCE if search_result is TUNED else HIGHER)
    figure = draw_curves(search_result)
    assert figure is not None
    shown = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert shown == [c.label for c in search_result.finalists if c is not baseline]
    assert baseline.label in figure.get_suptitle()


def test_a_curve_is_the_difference_of_training_losses() -> None:
    figure = draw_curves(search_result_of(MIXED, REFERENCE))
    assert figure is not None
    (axes,) = figure.axes
    (_, curve) = axes.get_lines()
    steps, differences = curve.get_data()
    assert len(steps) == 20
    assert steps[0] == 8.5  # of steps 1 to 16
    assert differences[-1] == pytest.approx(-0.1, abs=1e-3)


@pytest.mark.parametrize("search_result", [ONE_DIVERGED, ALL_DIVERGED, ADAM_WINS])
def test_without_a_pair_no_curve_is_drawn(search_result: SearchResult) -> None:
    assert draw_curves(search_result) is None


# ---- effect of each choice


def ablation(mean: float) -> Ablation:
    return Ablation(f"choice {mean}", "one", "other", Difference(mean, 0.01), 1, 150, 1)


def test_every_choice_has_a_row_with_its_difference() -> None:
    found = ablations(TUNED)
    figure = draw_ablation(found)
    assert figure is not None
    assert len(figure.axes) == 2  # short runs and finals
    for label, row in zip(labels(figure), found, strict=True):
        assert row.choice in label
        assert str(row.difference) in label


def test_one_run_that_nearly_diverged_does_not_flatten_the_others() -> None:
    figure = draw_ablation([ablation(mean) for mean in (0.01, -0.02, 0.015, 2.1)])
    assert figure is not None
    low, high = figure.axes[0].get_xlim()
    assert high - low < 0.2
    assert len(labels(figure)) == 4


def test_without_choices_nothing_is_drawn() -> None:
    assert draw_ablation([]) is None
    assert draw_ablation([ablation(math.nan)]) is None


# ---- loss against optimizer state


def test_the_line_is_the_lowest_loss_with_at_most_that_state() -> None:
    trials = [run for run in TRIALS if run.loss is not None]
    short, _ = draw_losses(search_result_of(MIXED, REFERENCE, UNIFORM, HIGHER, trials=trials)).axes
    (front,) = [line for line in short.get_lines() if line.get_drawstyle() == "steps-post"]
    for share, loss in list(zip(*front.get_data(), strict=True))[:-1]:
        affordable = [r.loss for r in trials if r.state_bytes <= share * ADAM_STATE and r.loss]
        assert loss == min(affordable)
    assert front.get_ydata()[-1] == min(run.loss for run in trials if run.loss)


def test_the_best_adam_is_the_zero_of_the_finals() -> None:
    _, finals = draw_losses(TUNED).axes
    marks = {tuple(line.get_xydata()[0]) for line in finals.get_lines() if line.get_marker() == "*"}
    assert (1.0, 0.0) in marks
    assert REFERENCE.label in finals.get_ylabel()


def test_finals_with_equal_state_are_drawn_side_by_side() -> None:
    other = replace(UNIFORM, label="another at level 2")
    _, finals = draw_losses(search_result_of(MIXED, REFERENCE, UNIFORM, other)).axes
    places = [line.get_xdata()[0] for line in finals.get_lines() if line.get_marker() in ("o", "D")]
    assert len({round(float(place), 6) for place in places}) == 3
