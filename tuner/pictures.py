"""The pictures of a search: levels as a heat map, memory as bars, every run and the finals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from foam_lightning.memory.account import Account
from foam_lightning.roles import ROLES
from foam_lightning.units import in_words
from tuner.objective import Difference
from tuner.run import Searched

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
_MAX_LEVEL = 8
_MAX_LAYERS_WITH_VALUES = 12
# A budget this many times longer than the bars is said in words: to scale it would squash them.
_LONGEST_BUDGET = 4
_DPI = 150


def save(figure: Figure, path: Path) -> None:
    """Write a PNG beside `path` and rename it, so that no half picture is ever seen."""
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=_DPI)
    beside.replace(path)


def draw_levels(
    grid: Mapping[int, Mapping[str, int]], title: str, elsewhere: Mapping[str, int]
) -> Figure:
    """Draw the level of every matrix, layers by roles.

    Args:
        grid: Level by layer and role; what is missing does not fold.
        title: Says whose levels they are.
        elsewhere: Levels of matrices outside the grid, by parameter name.
    """
    figure = _figure(6.4, min(11.0, 2.0 + 0.28 * max(6, len(grid))))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    most = max([_MAX_LEVEL, *(level for row in grid.values() for level in row.values())])
    colours = mpl.colormaps["cividis"].resampled(most + 1)
    palette = ListedColormap([colours(level) for level in range(most + 1)])
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
        bar = figure.colorbar(image, ax=axes, ticks=range(most + 1), label="fold level")
        bar.ax.tick_params(length=0)
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
    if elsewhere:
        names = [f"{name} at level {level}" for name, level in sorted(elsewhere.items())]
        more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
        axes.set_xlabel("\n".join(["also folded:", *names[:3], *more]), fontsize=9)
    return figure


def draw_memory(accounts: Mapping[str, Account], budget_bytes: int) -> Figure:
    """Draw the terms of each peak as a stacked bar, against the budget.

    Args:
        accounts: By label, from top to bottom; one or more.
        budget_bytes: The budget.
    """
    figure = _figure(8.4, 2.3 + 0.75 * len(accounts))
    figure.suptitle("Predicted peak memory of one device", fontsize=12)
    axes = figure.add_subplot()
    longest = max(account.peak_bytes for account in accounts.values())
    is_drawn = budget_bytes <= _LONGEST_BUDGET * longest
    width = 1.04 * (max(longest, budget_bytes) if is_drawn else longest)
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
    axes.set_yticks(
        range(len(accounts)),
        [f"{label}\n{in_words(account.peak_bytes)}" for label, account in accounts.items()],
    )
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_words(int(value))))
    axes.spines[["top", "right"]].set_visible(False)
    budget = f"budget {in_words(budget_bytes)}"
    if is_drawn:
        axes.axvline(budget_bytes, color="black", linestyle="--", linewidth=1.5)
        side = "right" if budget_bytes > width / 2 else "left"
        _above(axes, budget_bytes, budget, side)
    else:
        times = budget_bytes / longest
        _above(axes, width, f"{budget}, {times:.0f} times the longest bar: not drawn", "right")
    axes.legend(
        handles=[axes.containers[0][0].__class__((0, 0), 1, 1, color=_TERM_COLOURS[t]) for t in used],
        labels=[term.replace("_", " ") for term in used],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=4,
        frameon=False,
    )
    return figure


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
    FigureCanvasAgg(figure)  # type: ignore[no-untyped-call]
    return figure


def _ink(colour: str | tuple[float, ...]) -> str:
    """Choose black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"


def _above(axes: Axes, x: float, text: str, side: str) -> None:
    axes.text(x, 1.02, text, transform=axes.get_xaxis_transform(), ha=side, va="bottom")


def _print_values(axes: Axes, values: list[list[float]], palette: ListedColormap) -> None:
    for row, levels in enumerate(values):
        for column, level in enumerate(levels):
            if math.isnan(level):
                axes.text(column, row, "-", ha="center", va="center")
            else:
                ink = _ink(palette(int(level)))
                axes.text(column, row, str(level), ha="center", va="center", color=ink)


def _segment(axes: Axes, row: int, left: int, num_bytes: int, term: str, width: float) -> None:
    colour = _TERM_COLOURS[term]
    axes.barh(row, num_bytes, left=left, height=0.6, color=colour, edgecolor="white", linewidth=0.5)
    if num_bytes > 0.1 * width:
        middle = left + num_bytes / 2
        axes.text(
            middle, row, in_words(num_bytes), ha="center", va="center", fontsize=9, color=_ink(colour)
        )


def _draw_runs(axes: Axes, searched: Sequence[Searched], adam_state_bytes: int) -> None:
    axes.set_title("Short runs (lower is better)", fontsize=11)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlabel("state of the matrices, as a share of Adam's")
    losses = [run.loss for run in searched if run.loss is not None]
    low, high = _scale_of(losses)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.2 * (high - low))
    shares = [run.state_bytes / adam_state_bytes for run in searched] or [1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(shares) / 1.6, max(shares) * 1.6)
    powers = range(math.floor(math.log2(min(shares))), math.ceil(math.log2(max(shares))) + 1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.xaxis.set_major_formatter(FuncFormatter(_fraction))
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    at_edge: dict[float, count[int]] = {}
    for run, share in zip(searched, shares, strict=False):
        if run.loss is not None and run.loss <= high:
            _draw_run(axes, run, share)
            continue
        # Runs at the edge stand side by side: their height says nothing.
        beside = next(at_edge.setdefault(share, count())) * 10
        _draw_at_edge(axes, run, share, beside)
    legend = {
        "uniform (number: its level)": ("o", _BLUE),
        "mixed": ("D", _ORANGE),
        "diverged": ("x", _RED),
        "above the scale": ("^", _GREY),
    }
    kinds = {_kind(run, high) for run in searched}
    for label, (marker, colour) in legend.items():
        if label.split(" (")[0] in kinds:
            axes.plot([], [], marker=marker, color=colour, linestyle="", label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)


def _kind(run: Searched, high: float) -> str:
    if run.loss is None:
        return "diverged"
    if run.loss > high:
        return "above the scale"
    return "mixed" if run.level is None else "uniform"


def _scale_of(losses: Sequence[float]) -> tuple[float, float]:
    """Choose the range to draw: one run that nearly diverged must not flatten the others."""
    if not losses:
        return 0.0, 1.0
    low = min(losses)
    limit = low + max(4 * (statistics.median(losses) - low), 0.02)
    return low, max(max(loss for loss in losses if loss <= limit), low + 0.02)


def _fraction(share: float, _position: int | None) -> str:
    return "1" if share == 1 else f"{share:g}" if share > 1 else f"1/{round(1 / share)}"
