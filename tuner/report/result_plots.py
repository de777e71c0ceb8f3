"""Plots of a search: loss against optimizer state, training curves, effect of each choice."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from tuner.report.ablation import Ablation, CurveWindow, paired_loss_curve
from tuner.report.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, add_grid, new_figure
from tuner.trials.results import Candidate, SearchResult
from tuner.trials.runner import Difference

_MARKS = {
    "adam": ("Adam (level 0)", "*", RED, 16.0),
    "uniform": ("the same level for all matrices (number)", "o", BLUE, 14.0),
    "mixed": ("a level per matrix", "D", ORANGE, 8.5),
    "diverged": ("diverged", "x", GREY, 8.0),
    "above": ("above the axis", "^", GREY, 8.0),
}
_RING: Mapping[str, Any] = {"marker": "o", "mfc": "none", "mec": "black", "mew": 1.2}


def draw_losses(search_result: SearchResult) -> Figure:
    """Draw validation loss against optimizer state: short runs on the left, finals on the right.

    The two have different lengths and share no axis. Finals are shown as paired differences to the
    baseline, since they may have run on different numbers of seeds.

    Args:
        search_result: What was run.
    """
    figure = new_figure(11.0, 5.4)
    short, finals = figure.subplots(1, 2)
    used = _draw_short_runs(short, search_result) | _draw_finals(finals, search_result)
    handles = [
        Line2D([], [], marker=marker, color=colour, linestyle="", label=label)
        for kind, (label, marker, colour, _) in _MARKS.items()
        if kind in used
    ]
    if used & {"adam", "uniform", "mixed"}:
        handles.append(
            Line2D([], [], color=GREY, lw=1.2, label="lowest loss with this state or less")
        )
    if math.isfinite(search_result.winner.loss):
        handles.append(Line2D([], [], ls="", label="chosen plan", ms=11, **_RING))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_short_runs(axes: Axes, search_result: SearchResult) -> set[str]:
    axes.set_title(f"Short runs ({search_result.budget.steps} steps)", fontsize=11)
    axes.set_ylabel("validation loss (nats per token)")
    runs = search_result.trials
    shares = [run.state_bytes / search_result.adam_state_bytes for run in runs]
    losses = [run.loss for run in runs if run.loss is not None]
    low, high = _loss_scale(losses, [r.loss for r in runs if r.loss is not None and r.level == 0])
    axes.set_ylim(low - 0.08 * (high - low), high + 0.16 * (high - low))
    if not losses:
        axes.set_yticks([])
    _share_axis(axes, shares)
    used, num_at_edge = set[str](), Counter[float]()
    for run, share in zip(runs, shares, strict=True):
        if run.loss is None or run.loss > high:
            kind = "diverged" if run.loss is None else "above"
            _mark_at_edge(axes, share, kind, num_at_edge[share])
            num_at_edge[share] += 1
        else:
            kind = _kind(run.level)
            _mark(axes, share, run.loss, kind, run.level)
        used.add(kind)
    _draw_front(
        axes,
        [(s, run.loss) for s, run in zip(shares, runs, strict=True) if run.loss is not None],
    )
    return used


def _draw_finals(axes: Axes, search_result: SearchResult) -> set[str]:
    baseline, finalists = search_result.baseline, search_result.finalists
    axes.set_title(f"Finals ({search_result.budget.final_steps} steps)", fontsize=11)
    axes.set_ylabel(f"difference to {baseline.label} (nats, 95 % interval)")
    shares = [c.state_bytes / search_result.adam_state_bytes for c in finalists]
    _share_axis(axes, shares)
    left, right = axes.get_xlim()
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
    used, front, num_at = set[str](), list[tuple[float, float]](), Counter[float]()
    for candidate, share in zip(finalists, shares, strict=True):
        # Moved aside if others have the same state, so that intervals do not overlap.
        place = share * (right / left) ** (-0.05 * num_at[share])
        num_at[share] += 1
        level = _level_of(candidate)
        kind = _kind(level) if math.isfinite(candidate.loss) else "diverged"
        used.add(kind)
        if kind == "diverged":
            _mark_at_edge(axes, place, kind, 0)
            continue
        gap = 0.0
        if candidate is not baseline:
            difference = candidate.against(baseline)
            gap = difference.mean
            axes.errorbar(place, gap, difference.half_width, capsize=4, color=_MARKS[kind][2])
        _mark(axes, place, gap, kind, level)
        if candidate is search_result.winner:
            axes.plot(place, gap, ms=20, zorder=6, **_RING)
        front.append((place, gap))
    _draw_front(axes, front)
    axes.margins(y=0.15)
    if not front:
        axes.set_yticks([])
    return used


def _share_axis(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xlabel("optimizer state of the folded matrices (1 = Adam's)")
    shares = [*shares, 1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(shares) / 1.6, max(shares) * 1.6)
    powers = range(math.floor(math.log2(min(shares))), math.ceil(math.log2(max(shares))) + 1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.xaxis.set_major_formatter(FuncFormatter(_fraction))
    add_grid(axes)


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draw the lowest loss of all points with at most this share."""
    front = list[tuple[float, float]]()
    for share, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((share, loss))
    if front:
        end = (axes.get_xlim()[1], front[-1][1])
        axes.step(*zip(*front, end, strict=True), where="post", color=GREY, lw=1.2, zorder=1.5)


def _mark(axes: Axes, share: float, loss: float, kind: str, level: int | None) -> None:
    _, marker, colour, size = _MARKS[kind]
    axes.plot(share, loss, marker=marker, ms=size, color=colour, mec="white", ls="", zorder=4)
    if level:
        number = axes.text(share, loss, str(level), color="white", fontsize=9, zorder=5)
        number.set(ha="center", va="center_baseline")


def _mark_at_edge(axes: Axes, share: float, kind: str, num_before: int) -> None:
    """Mark at the top a run that is off the scale, next to `num_before` others at its share."""
    _, marker, colour, size = _MARKS[kind]
    left, right = axes.get_xlim()
    points = num_before * (11 if share < math.sqrt(left * right) else -11)
    shift = ScaledTranslation(points / 72, -9 / 72, axes.figure.dpi_scale_trans)
    place = axes.get_xaxis_transform() + shift
    axes.plot(share, 1, marker=marker, ms=size, mew=2, color=colour, transform=place)


def _kind(level: int | None) -> str:
    return "mixed" if level is None else "uniform" if level else "adam"


def _level_of(candidate: Candidate) -> int | None:
    return None if candidate.kind == "mixed" else next(iter(candidate.plan.levels.values()))


def _loss_scale(losses: Sequence[float], of_adam: Sequence[float]) -> tuple[float, float]:
    """Choose the range of losses: without runs that nearly diverged, but with the best Adam."""
    if not losses:
        return 0.0, 1.0
    low = min(losses)
    limit = max(low + max(4 * (statistics.median(losses) - low), 0.02), min(of_adam, default=low))
    high = max(loss for loss in losses if loss <= limit)
    lacking = max(0.0, 0.02 - (high - low))
    return low - lacking / 2, high + lacking / 2


def _fraction(share: float, _position: int | None) -> str:
    return "1" if share == 1 else f"{share:g}" if share > 1 else f"1/{round(1 / share)}"


_LINES = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
# The first quarter, where differences are largest, does not set the range of the axis.
_EARLY = 0.25


def draw_curves(search_result: SearchResult) -> Figure | None:
    """Draw the training loss of each finalist relative to the baseline over the run.

    Args:
        search_result: What was run.

    Returns:
        A panel for each finalist but the baseline; None if there is nothing to draw.
    """
    baseline = search_result.baseline
    curves = {
        c.label: windows
        for c in search_result.finalists
        if c is not baseline and (windows := _windows(c, baseline))
    }
    if not curves:
        return None
    num_columns = min(2, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = new_figure(2.0 + 4.5 * num_columns, 1.3 + 2.4 * num_rows)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (label, windows), colour in zip(
        panels.flat, curves.items(), _LINES * len(curves), strict=False
    ):
        _draw_curve(axes, label, windows, colour)
    for axes in panels.flat[: len(curves)][-num_columns:]:
        axes.tick_params(labelbottom=True)  # the panel below may be hidden
    late = [w.difference for ws in curves.values() for w in ws[int(_EARLY * len(ws)) :]]
    panels.flat[0].set_ylim(*_range_of(late))
    figure.suptitle(f"Training loss minus {baseline.label}, on the same batches", fontsize=12)
    figure.supylabel("difference (nats per token); below 0 is better", fontsize=10)
    figure.supxlabel("optimizer step (means of windows, with 95 % intervals)", fontsize=10)
    return figure


def draw_ablation(ablations: Sequence[Ablation]) -> Figure | None:
    """Draw the effect of each choice with its interval, in a panel for each length of run.

    Args:
        ablations: From top to bottom.

    Returns:
        None if there is nothing to draw.
    """
    finite = [ablation for ablation in ablations if math.isfinite(ablation.difference.mean)]
    groups = [
        [a for a in finite if a.steps == steps] for steps in sorted({a.steps for a in finite})
    ]
    if not groups:
        return None
    heights = [0.6 + 0.4 * len(group) for group in groups]
    figure = new_figure(8.4, 0.9 + sum(heights))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
    sizes = [abs(a.difference.mean) + a.difference.half_width for a in finite]
    # A run that nearly diverged must not flatten the others.
    limit = 10 * statistics.median(sizes)
    low, high = _range_of([a.difference for a in finite if abs(a.difference.mean) <= limit])
    for axes, group in zip(panels.flat, groups, strict=True):
        _draw_ablations(axes, group, low, high)
    panels.flat[0].set_xlim(low, high)
    panels.flat[-1].set_xlabel(
        "difference in validation loss (nats per token, 95 % interval); below 0 it helped\n"
        "hollow: not significant, the interval includes 0"
    )
    return figure


# ---- training curves


def _windows(candidate: Candidate, baseline: Candidate) -> list[CurveWindow]:
    """Compare the training losses on the seeds that both ran; none where a run diverged."""
    num_seeds = min(len(candidate.runs), len(baseline.runs))
    windows = paired_loss_curve(candidate.runs[:num_seeds], baseline.runs[:num_seeds])
    return [window for window in windows if math.isfinite(window.difference.mean)]


def _draw_curve(axes: Axes, label: str, windows: Sequence[CurveWindow], colour: str) -> None:
    axes.set_title(label, fontsize=11)
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
    steps = [(window.first + window.last) / 2 for window in windows]
    means = [window.difference.mean for window in windows]
    widths = [window.difference.half_width for window in windows]
    low, high = np.subtract(means, widths), np.add(means, widths)
    axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(steps, means, color=colour, marker="o", markersize=3.5)
    add_grid(axes)


def _range_of(differences: Sequence[Difference]) -> tuple[float, float]:
    """Choose the range of an axis: zero and all intervals, with a margin."""
    low = min(0.0, *(d.mean - d.half_width for d in differences))
    high = max(0.0, *(d.mean + d.half_width for d in differences))
    margin = 0.1 * (high - low)
    return low - margin, high + margin


# ---- effect of each choice


def _draw_ablations(axes: Axes, ablations: Sequence[Ablation], low: float, high: float) -> None:
    axes.set_title(f"Runs of {ablations[0].steps} steps", fontsize=11)
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
    for row, ablation in enumerate(ablations):
        difference = ablation.difference
        if not low < difference.mean < high:
            is_left = difference.mean < low
            place = (0.02 if is_left else 0.98, row)
            edge = axes.get_yaxis_transform()
            axes.plot(*place, "<" if is_left else ">", ms=9, color=BLUE, transform=edge)
            continue
        fill = BLUE if difference.is_decided else "white"
        axes.errorbar(difference.mean, row, xerr=difference.half_width, capsize=4, color=BLUE)
        axes.plot(difference.mean, row, "o", markersize=7, color=BLUE, mfc=fill)
    axes.set_yticks(
        range(len(ablations)), [f"{a.choice}\n{a.difference}" for a in ablations], fontsize=9
    )
    axes.set_ylim(len(ablations) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    add_grid(axes, "x")
