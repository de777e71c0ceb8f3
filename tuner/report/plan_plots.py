"""The plot of a plan: its predicted memory as bars, its fold levels as a heat map."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from foam_lightning.memory.account import Account
from foam_lightning.memory.options import MAX_LEVEL
from foam_lightning.model.roles import ALL_ROLES
from foam_lightning.units import format_bytes
from tuner.report.plan_table import TERM_NAMES
from tuner.report.style import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    new_figure,
    text_colour_on,
)

_TERM_COLOURS = {
    "weights": BLUE,
    "gradients": SKY,
    "optimizer_state": ORANGE,
    "activations": GREEN,
    "loss": YELLOW,
    "workspace": PINK,
    "context": "#999999",
    "margin": "#D9D9D9",
    "slack": "#F2F2F2",
}
_LEVELS_HEIGHT = 2.6
_MAX_LAYERS_WITH_VALUES = 40
# Of a label, as a share of the width of the axes.
_LETTER_WIDTH = 0.0135
# A larger budget is named and not drawn: at its scale the bars would be too short to read.
_MAX_BUDGET_RATIO = 4
_BOLD: Mapping[str, Any] = {"fontsize": 11, "fontweight": "bold"}


def draw_plan(
    accounts: Mapping[str, Account],
    budget_bytes: int | None,
    grid: Mapping[int, Mapping[str, int]],
    title: str = "Predicted peak memory of each device",
) -> Figure:
    """Draw the memory of plans as stacked bars, and below them the fold levels of one as a map.

    Args:
        accounts: The predicted peaks, one or more, by label, from top to bottom.
        budget_bytes: The budget; None if there is none.
        grid: Level by layer and role; if empty, only the memory is drawn.
        title: The heading.
    """
    memory_height = 1.6 + 0.9 * len(accounts)
    figure = new_figure(8.4, memory_height + (_LEVELS_HEIGHT if grid else 0))
    if not grid:
        _draw_memory(figure, accounts, budget_bytes, title)
        return figure
    heights = [memory_height, _LEVELS_HEIGHT]
    parts = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_memory(parts[0], accounts, budget_bytes, title)
    _draw_levels(parts[1], grid)
    return figure


# ---- memory


def _draw_memory(
    figure: Figure | SubFigure,
    accounts: Mapping[str, Account],
    budget_bytes: int | None,
    title: str,
) -> None:
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.add_subplot()
    longest = max(account.peak_bytes for account in accounts.values())
    is_drawn = budget_bytes is not None and budget_bytes <= _MAX_BUDGET_RATIO * longest
    # Each bar leaves room at its right for its total.
    width = max(1.28 * longest, 1.04 * (budget_bytes or 0) if is_drawn else 0)
    unlabelled = set[str]()
    for row, account in enumerate(accounts.values()):
        unlabelled |= _draw_bar(axes, row, account, width)
        _write_total(axes, row, account.peak_bytes, budget_bytes)
    axes.set_xlim(0, width)
    axes.set_ylim(len(accounts) - 0.5, -0.5)
    axes.set_yticks(range(len(accounts)), list(accounts), fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(int(value))))
    axes.spines[["top", "right"]].set_visible(False)
    if budget_bytes is not None:
        _draw_budget(axes, budget_bytes, width if is_drawn else None, longest)
    handles = [
        Patch(color=colour, label=TERM_NAMES[term])
        for term, colour in _TERM_COLOURS.items()
        if term in unlabelled
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9.5)


def _draw_bar(axes: Axes, row: int, account: Account, width: float) -> set[str]:
    """Draw the terms side by side, each with its name if there is room; return the others."""
    unlabelled = set[str]()
    left = 0
    for term, colour in _TERM_COLOURS.items():
        num_bytes = account.breakdown[term]
        centre, share = left + num_bytes / 2, num_bytes / width
        left += num_bytes
        axes.barh(row, num_bytes, height=0.7, left=left - num_bytes, color=colour, ec="white")
        name = TERM_NAMES[term]
        if len(name) * _LETTER_WIDTH > share:
            name = name.replace(" ", "\n", 1)
        if max(map(len, name.split("\n"))) * _LETTER_WIDTH <= share:
            text = axes.text(centre, row, f"{name}\n{_short(num_bytes)}", zorder=5)
            # The box keeps the budget line from crossing the text.
            text.set(ha="center", va="center", color=text_colour_on(colour), bbox=_box(colour))
        elif share > 1e-3:
            unlabelled.add(term)
    return unlabelled


def _write_total(axes: Axes, row: int, peak_bytes: int, budget_bytes: int | None) -> None:
    """Write the peak to the right of its bar, and whether it is within the budget."""
    total, colour = _short(peak_bytes), "black"
    if budget_bytes is not None and peak_bytes > budget_bytes:
        total, colour = f"{total}\n{_short(peak_bytes - budget_bytes)} over", RED
    elif budget_bytes is not None:
        total = f"{total}\nfits"
    label = axes.annotate(total, (peak_bytes, row), (7, 0), textcoords="offset points", **_BOLD)
    label.set(va="center", color=colour, bbox=_box("white"))


def _draw_budget(axes: Axes, budget_bytes: int, width: float | None, longest: int) -> None:
    """Draw the budget as a line; without a width, only name it at the right edge."""
    text, place, align = f"budget {_short(budget_bytes)}", float(budget_bytes), "center"
    if width is None:
        text += f", {budget_bytes / longest:.0f} times the longest bar (not drawn)"
        place, align = axes.get_xlim()[1], "right"
    else:
        axes.axvline(budget_bytes, color="black", linestyle="--", linewidth=1.8)
        if budget_bytes > 0.9 * width:
            align = "right"
    edge = axes.get_xaxis_transform()
    axes.text(place, 1.02, text, transform=edge, ha=align, va="bottom", **_BOLD)


def _box(colour: str) -> dict[str, object]:
    return {"facecolor": colour, "edgecolor": "none", "pad": 1.5}


def _short(num_bytes: int) -> str:
    """Format bytes with three digits, which is what a plot can show."""
    number, unit = format_bytes(num_bytes).split()
    return f"{float(number):.3g} {unit}" if float(number) < 999.5 else f"{number} {unit}"


# ---- levels


def _draw_levels(figure: SubFigure, grid: Mapping[int, Mapping[str, int]]) -> None:
    axes = figure.add_subplot()
    axes.set_title(
        "Fold level of each matrix: 2^level columns share one optimizer state; 0 is Adam",
        fontsize=11,
    )
    found = {role for cells in grid.values() for role in cells}
    roles = [role for role in ALL_ROLES if role in found]
    axes.set_yticks(range(len(roles)), roles)
    axes.set_xlabel("layer")
    layers = sorted(grid)
    values = [[grid[layer].get(role, math.nan) for layer in layers] for role in roles]
    palette = ListedColormap(colormaps["viridis"](np.linspace(0, 1, MAX_LEVEL + 1)))
    norm = BoundaryNorm([level - 0.5 for level in range(MAX_LEVEL + 2)], MAX_LEVEL + 1)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=palette, norm=norm)
    stride = 1 if len(layers) <= 16 else 4
    axes.set_xticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
    # Thin white lines keep neighbours of equal level apart.
    axes.set_xticks([x - 0.5 for x in range(1, len(layers))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(roles))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    if len(layers) <= _MAX_LAYERS_WITH_VALUES:
        _print_values(axes, values, palette)
    else:
        bar = figure.colorbar(image, ax=axes, label="fold level", ticks=range(MAX_LEVEL + 1))
        bar.ax.tick_params(which="both", length=0)


def _print_values(axes: Axes, values: list[list[float]], palette: ListedColormap) -> None:
    for row, levels in enumerate(values):
        for column, level in enumerate(levels):
            text = axes.text(column, row, "-", ha="center", va="center", fontsize=9)
            if not math.isnan(level):
                text.set(text=str(level), color=text_colour_on(palette(int(level))))
