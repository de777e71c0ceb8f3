import math
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from tests.search_results import (
    ADAM_STATE,
    ADAM_WINS,
    ALL_DIVERGED,
    HIGHER,
    MIXED,
    NO_REFERENCE,
    ONE_DIVERGED,
    REFERENCE,
    SEARCHED,
    TUNED,
    UNIFORM,
    outcome_of,
)
from tuner.report.ablation import Ablation, ablations
from tuner.report.result_plots import draw_ablation, draw_curves, draw_losses
from tuner.trials.results import SearchResult
from tuner.trials.runner import Difference


def curves(search_result: SearchResult) -> Figure:
    figure = draw_curves(search_result)
    assert figure is not None
    return figure


def labels(figure: Figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.get_yticklabels()]


def test_every_finalist_but_the_baseline_has_a_curve_against_it() -> None:
    figure = curves(TUNED)
    shown = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert shown == [c.label for c in TUNED.finalists if c is not REFERENCE]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["split-lr Adam"]  # at the zero line


def test_a_curve_is_the_gap_of_training_losses() -> None:
    (axes,) = curves(outcome_of(MIXED, REFERENCE, trials=[])).axes
    (_, curve) = axes.get_lines()
    steps, gaps = curve.get_data()
    assert len(steps) == 20
    assert steps[0] == 8.5  # of steps 1 to 16
    assert gaps[-1] == pytest.approx(-0.1, abs=1e-3)


def test_without_adam_curves_are_against_the_best_uniform_plan() -> None:
    figure = curves(NO_REFERENCE)
    assert [axes.get_title() for axes in figure.axes] == [UNIFORM.label]
    assert HIGHER.label in {text.get_text() for text in figure.axes[0].texts}


@pytest.mark.parametrize("search_result", [ONE_DIVERGED, ALL_DIVERGED, ADAM_WINS])
def test_where_nothing_pairs_no_curve_is_drawn(search_result: SearchResult) -> None:
    assert draw_curves(search_result) is None


def test_every_knob_has_a_row_with_its_figures() -> None:
    found = ablations(TUNED)
    figure = draw_ablation(found)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["Runs of 160 steps", "Runs of 320 steps"]
    assert labels(figure) == [f"{worth.knob}\n{worth.difference}" for worth in found]


def test_one_setting_that_nearly_diverged_does_not_flatten_the_others() -> None:
    rows = [worth_of(mean) for mean in (0.01, -0.02, 0.015, 2.1)]
    figure = draw_ablation(rows)
    assert figure is not None
    low, high = figure.axes[0].get_xlim()
    assert high - low < 0.2
    assert len(labels(figure)) == 4


def test_no_knobs_give_no_picture() -> None:
    assert draw_ablation([]) is None
    assert draw_ablation([worth_of(math.nan)]) is None


def worth_of(mean: float) -> Ablation:
    return Ablation(f"knob {mean}", "one", "other", Difference(mean, 0.01), 1, 150, 1)


def test_the_front_is_the_least_loss_of_all_that_need_no_more_bytes() -> None:
    searched = [run for run in SEARCHED if run.loss is not None]
    short, _ = draw_losses(outcome_of(MIXED, REFERENCE, UNIFORM, HIGHER, trials=searched)).axes
    (front,) = [line for line in short.get_lines() if line.get_drawstyle() == "steps-post"]
    for share, loss in list(zip(*front.get_data(), strict=True))[:-1]:
        affordable = [r.loss for r in searched if r.state_bytes <= share * ADAM_STATE and r.loss]
        assert loss == min(affordable)
    assert front.get_ydata()[-1] == min(run.loss for run in searched if run.loss)


def test_adam_at_its_best_is_the_zero_of_the_finals() -> None:
    _, finals = draw_losses(TUNED).axes
    marks = {tuple(line.get_xydata()[0]) for line in finals.get_lines() if line.get_marker() == "*"}
    assert (1.0, 0.0) in marks
    assert finals.get_ylabel().startswith("loss minus that of split-lr Adam")


def test_finals_at_equal_bytes_stand_side_by_side() -> None:
    proxy_model = replace(UNIFORM, label="another at level 2")
    _, finals = draw_losses(outcome_of(MIXED, REFERENCE, UNIFORM, proxy_model, trials=[])).axes
    places = [line.get_xdata()[0] for line in finals.get_lines() if line.get_marker() in ("o", "D")]
    assert len({round(float(place), 6) for place in places}) == 3
