"""The pictures of a plan: its levels as a heat map, its memory as bars."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from foam_lightning.memory.account import Account
from foam_lightning.model.roles import ROLES
from foam_lightning.units import format_bytes
from tuner.report.style import BLUE, GREEN, ORANGE, PINK, SKY, YELLOW, ink_on, new_figure

_TERM_COLOURS = {
    "weights": BLUE,
    "gradients": SKY,
    "optimizer_state": ORANGE,
    "activations": GREEN,
    "loss": YELLOW,
    "workspace": PINK,
    "context": "#999999",
    "margin": "#D9D9D9",
}
_MAX_LEVEL = 8
_MAX_LAYERS_WITH_VALUES = 12
# A budget this many times longer than the bars is said in words: to scale it would squash them.
_LONGEST_BUDGET = 4


def draw_levels(grid: Mapping[int, Mapping[str, int]], title: str) -> Figure:
    """Draw the level of every matrix, layers by roles.

    Args:
        grid: Level by layer and role; what is missing does not fold.
        title: Says whose levels they are.
    """
    figure = new_figure(6.4, _levels_height(len(grid)))
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
    figure = new_figure(8.4, sum(heights))
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
    figure = new_figure(8.4, _memory_height(len(accounts)))
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
    names = [f"{label}\n{format_bytes(peak)}" for label, peak in peaks.items()]
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(int(value))))
    axes.spines[["top", "right"]].set_visible(False)
    if budget_bytes is not None:
        budget = f"budget {format_bytes(budget_bytes)}"
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


def _print_values(axes: Axes, values: list[list[float]], palette: ListedColormap) -> None:
    for row, levels in enumerate(values):
        for column, level in enumerate(levels):
            folds = not math.isnan(level)
            ink = ink_on(palette(int(level))) if folds else "black"
            text = str(level) if folds else "-"
            axes.text(column, row, text, ha="center", va="center", color=ink)


def _segment(axes: Axes, row: int, left: int, num_bytes: int, term: str, width: float) -> None:
    colour = _TERM_COLOURS[term]
    axes.barh(row, num_bytes, left=left, height=0.6, color=colour, edgecolor="white", linewidth=0.5)
    if num_bytes > 0.105 * width:
        axes.text(
            left + num_bytes / 2,
            row,
            format_bytes(num_bytes),
            ha="center",
            va="center",
            fontsize=9,
            color=ink_on(colour),
            # Keeps the line of the budget from crossing the digits.
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
            zorder=5,
        )
