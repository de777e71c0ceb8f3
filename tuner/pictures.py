"""The pictures of a search: levels as a heat map, memory as bars, every run and the finals."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from foam_lightning.memory.account import Account
from foam_lightning.roles import ROLES
from foam_lightning.units import in_words
from tuner.objective import Difference
from tuner.outcome import Searched

# The palette of Okabe and Ito, which the colour-blind can tell apart.
_BLUE, _ORANGE, _RED, _GREY = "#0072B2", "#E69F00", "#D55E00", "#666666"
_TERM_COLOURS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer_state": "#E69F00",
    "activations": "#009E73",
    "loss": "#F0E442",
    "workspace": "#CC79A7",
    "context": "#999999",
    "margin": "#D9D9D9",
}
_LEGEND = {
    "uniform": ("one level for all matrices (its number)", "o", _BLUE),
    "mixed": ("a level per matrix", "D", _ORANGE),
    "diverged": ("diverged", "x", _RED),
    "above": ("above the scale", "^", _GREY),
}
_MAX_LEVEL = 8
_MAX_LAYERS_WITH_VALUES = 12
# A budget this many times longer than the bars is said in words: to scale it would squash them.
_LONGEST_BUDGET = 4


def save(figure: Figure, path: Path) -> None:
    """Write a PNG beside `path` and rename it, so that no half picture is ever seen."""
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=150)
    beside.replace(path)


def draw_levels(grid: Mapping[int, Mapping[str, int]], title: str) -> Figure:
    """Draw the level of every matrix, layers by roles.

    Args:
        grid: Level by layer and role; what is missing does not fold.
        title: Says whose levels they are.
    """
    figure = _figure(6.4, _levels_height(len(grid)))
    _draw_levels(figure, grid, title)
    return figure


def draw_plan(
    accounts: Mapping[str, Account],
    budget_bytes: int | None,
    grid: Mapping[int, Mapping[str, int]],
) -> Figure:
    """Draw a plan on one sheet: its memory as in `draw_memory`, its levels as in `draw_levels`.

    Args:
        accounts: By label, from top to bottom; one or more.
        budget_bytes: The budget; None where none was given.
        grid: Level by layer and role; empty where no matrix folds, and then not drawn.
    """
    heights = [_memory_height(len(accounts))]
    if grid:
        heights.append(_levels_height(len(grid)))
    figure = _figure(8.4, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_memory(parts[0], accounts, budget_bytes)
    if grid:
        _draw_levels(parts[1], grid, "Fold levels")
    return figure


def _levels_height(num_layers: int) -> float:
    return min(11.0, 2.0 + 0.28 * max(6, num_layers))


def _draw_levels(
    figure: Figure | SubFigure, grid: Mapping[int, Mapping[str, int]], title: str
) -> None:
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    most = max([_MAX_LEVEL, *(level for row in grid.values() for level in row.values())])
    palette = ListedColormap(colormaps["viridis"](np.linspace(0, 1, most + 1)))
    layers = sorted(grid)
    values = [[grid[layer].get(role, math.nan) for role in ROLES] for layer in layers]
    axes.set_xticks(range(len(ROLES)), ROLES)
    if values:
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap=palette,
            norm=BoundaryNorm([level - 0.5 for level in range(most + 2)], most + 1),
        )
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 14 / len(layers)))
        bar.set_ticks(range(most + 1))
        bar.set_label("fold level")
        bar.ax.tick_params(which="both", length=0)
    stride = 1 if len(layers) <= 40 else 4
    axes.set_yticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
    axes.set_ylabel("layer")
    # Thin white lines keep neighbours of equal level apart.
    axes.set_xticks([x - 0.5 for x in range(1, len(ROLES))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(layers))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    if len(layers) <= _MAX_LAYERS_WITH_VALUES:
        _print_values(axes, values, palette)


def draw_memory(accounts: Mapping[str, Account], budget_bytes: int) -> Figure:
    """Draw the terms of each peak as a stacked bar, against the budget.

    Args:
        accounts: By label, from top to bottom; one or more.
        budget_bytes: The budget.
    """
    figure = _figure(8.4, _memory_height(len(accounts)))
    _draw_memory(figure, accounts, budget_bytes)
    return figure


def _memory_height(num_bars: int) -> float:
    return 2.3 + 0.75 * num_bars


def _draw_memory(
    figure: Figure | SubFigure, accounts: Mapping[str, Account], budget_bytes: int | None
) -> None:
    figure.suptitle("Predicted peak memory of one device", fontsize=12)
    axes = figure.add_subplot()
    peaks = {label: account.peak_bytes for label, account in accounts.items()}
    longest = max(peaks.values())
    is_drawn = budget_bytes is not None and budget_bytes <= _LONGEST_BUDGET * longest
    width = 1.04 * (max(longest, budget_bytes or 0) if is_drawn else longest)
    used: dict[str, None] = {}
    for row, account in enumerate(accounts.values()):
        left = 0
        for term, num_bytes in account.breakdown.items():
            if num_bytes:
                used[term] = None
                _segment(axes, row, left, num_bytes, term, width)
            left += num_bytes
    axes.set_xlim(0, width)
    axes.set_ylim(len(accounts) - 0.5, -0.5)
    names = [f"{label}\n{in_words(peak)}" for label, peak in peaks.items()]
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_words(int(value))))
    axes.spines[["top", "right"]].set_visible(False)
    if budget_bytes is not None:
        budget = f"budget {in_words(budget_bytes)}"
        if is_drawn:
            axes.axvline(budget_bytes, color="black", linestyle="--", linewidth=1.5)
        else:
            budget += f", {budget_bytes / longest:.0f} times the longest bar: not drawn"
        # Wherever the line is, the text ends there: it is never cut off at the right.
        end = budget_bytes if is_drawn else width
        axes.text(end, 1.02, budget, transform=axes.get_xaxis_transform(), ha="right", va="bottom")
    axes.legend(
        handles=[Patch(color=_TERM_COLOURS[term], label=term.replace("_", " ")) for term in used],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=4,
        frameon=False,
    )


def draw_search(
    searched: Sequence[Searched],
    adam_state_bytes: int,
    differences: Mapping[str, Difference | None],
) -> Figure:
    """Draw the loss of every short run against its bytes, and the finals against their winner.

    Args:
        searched: The short runs.
        adam_state_bytes: Of the matrices that fold, at level 0.
        differences: Of every finalist to the winner by label, top to bottom; the winner's is None.
    """
    figure = _figure(11.0, 5.0)
    runs, finals = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    _draw_runs(runs, searched, adam_state_bytes)
    _draw_finals(finals, differences)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _ink(colour: str | tuple[float, float, float, float]) -> str:
    """Choose black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"


def _print_values(axes: Axes, values: list[list[float]], palette: ListedColormap) -> None:
    for row, levels in enumerate(values):
        for column, level in enumerate(levels):
            folds = not math.isnan(level)
            ink = _ink(palette(int(level))) if folds else "black"
            text = str(level) if folds else "-"
            axes.text(column, row, text, ha="center", va="center", color=ink)


def _segment(axes: Axes, row: int, left: int, num_bytes: int, term: str, width: float) -> None:
    colour = _TERM_COLOURS[term]
    axes.barh(row, num_bytes, left=left, height=0.6, color=colour, edgecolor="white", linewidth=0.5)
    if num_bytes > 0.105 * width:
        axes.text(
            left + num_bytes / 2,
            row,
            in_words(num_bytes),
            ha="center",
            va="center",
            fontsize=9,
            color=_ink(colour),
            # Keeps the line of the budget from crossing the digits.
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
            zorder=5,
        )


def _draw_runs(axes: Axes, searched: Sequence[Searched], adam_state_bytes: int) -> None:
    axes.set_title("Short runs (lower is better)", fontsize=11)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlabel("state of the matrices, as a share of Adam's")
    losses = [run.loss for run in searched if run.loss is not None]
    low, high = _scale_of(losses)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.16 * (high - low))
    if not losses:
        axes.set_yticks([])
    shares = [run.state_bytes / adam_state_bytes for run in searched] or [1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(shares) / 1.6, max(shares) * 1.6)
    powers = range(math.floor(math.log2(min(shares))), math.ceil(math.log2(max(shares))) + 1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.xaxis.set_major_formatter(FuncFormatter(_fraction))
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    kinds = [_kind(run, high) for run in searched]
    num_at_edge = Counter[float]()
    for run, kind, share in zip(searched, kinds, shares, strict=False):
        if run.loss is None or run.loss > high:
            _mark_at_edge(axes, share, kind, num_at_edge[share])
            num_at_edge[share] += 1
        else:
            _mark_run(axes, share, run.loss, run.level)
    for kind, (label, marker, colour) in _LEGEND.items():
        if kind in kinds:
            axes.plot([], [], marker=marker, color=colour, linestyle="", label=label)
    if kinds:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _mark_run(axes: Axes, share: float, loss: float, level: int | None) -> None:
    _, marker, colour = _LEGEND["mixed" if level is None else "uniform"]
    axes.scatter(share, loss, s=70 if level is None else 190, marker=marker, color=colour, ec="w")
    if level is not None:
        number = str(level)
        axes.text(share, loss, number, ha="center", va="center_baseline", color="w", fontsize=9)


def _mark_at_edge(axes: Axes, share: float, kind: str, num_before: int) -> None:
    """Mark a run whose height says nothing, beside those before it at the same share."""
    _, marker, colour = _LEGEND[kind]
    shift = ScaledTranslation(num_before * 11 / 72, -9 / 72, axes.figure.dpi_scale_trans)
    place = axes.get_xaxis_transform() + shift
    axes.plot(share, 1, marker=marker, markersize=8, mew=2, color=colour, transform=place)


def _kind(run: Searched, high: float) -> str:
    if run.loss is None:
        return "diverged"
    if run.loss > high:
        return "above"
    return "mixed" if run.level is None else "uniform"


def _scale_of(losses: Sequence[float]) -> tuple[float, float]:
    """Choose the range to draw: one run that nearly diverged must not flatten the others."""
    if not losses:
        return 0.0, 1.0
    low = min(losses)
    limit = low + max(4 * (statistics.median(losses) - low), 0.02)
    high = max(loss for loss in losses if loss <= limit)
    lacking = max(0.0, 0.02 - (high - low))
    return low - lacking / 2, high + lacking / 2


def _fraction(share: float, _position: int | None) -> str:
    return "1" if share == 1 else f"{share:g}" if share > 1 else f"1/{round(1 / share)}"


def _draw_finals(axes: Axes, differences: Mapping[str, Difference | None]) -> None:
    axes.set_title("Finals: loss above the winner's", fontsize=11)
    axes.set_xlabel("paired difference (nats per token), 95 % interval")
    axes.axvline(0, color=_GREY, linewidth=1)
    labels = []
    for row, (label, difference) in enumerate(differences.items()):
        if difference is None:
            axes.plot(0, row, "*", markersize=16, color=_BLUE)
            labels.append(f"{label}\n(winner)")
        elif math.isnan(difference.mean):
            edge = axes.get_yaxis_transform()
            axes.plot(0.96, row, "x", markersize=9, mew=2, color=_RED, transform=edge)
            labels.append(f"{label}\ndiverged")
        else:
            fill = _BLUE if difference.is_decided else "white"
            axes.errorbar(difference.mean, row, xerr=difference.half_width, capsize=5, color=_BLUE)
            axes.plot(difference.mean, row, "o", markersize=8, color=_BLUE, mfc=fill)
            labels.append(f"{label}\n{difference}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    if any(d and not d.is_decided and not math.isnan(d.mean) for d in differences.values()):
        note = "hollow: the interval holds zero, so nothing is decided"
        axes.text(0.5, -0.17, note, transform=axes.transAxes, ha="center", va="top")
