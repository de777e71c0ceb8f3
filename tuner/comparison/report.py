"""The results of a comparison: a table for the terminal, `compare.md` and `compare.png`."""

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foam_lightning import __version__
from foam_lightning.storage.atomic import write_text
from foam_lightning.units import format_bytes
from tuner.comparison.compare import MAX_RATES, MIN_RATES, Comparison, OptimizerResult
from tuner.comparison.profile import machine, packages
from tuner.report.markdown import markdown_table
from tuner.report.plan_table import ByWidth
from tuner.report.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, add_grid, new_figure, save

_STYLES = {
    "foam": (BLUE, "o"),
    "adamw": (RED, "*"),
    "split_adamw": (ORANGE, "*"),
    "galore": (GREEN, "s"),
    "apollo": (SKY, "D"),
    "fira": (PINK, "v"),
    "adam_mini": (GREY, "P"),
    "muon": ("#8B5A2B", "^"),
    "adamw8bit": ("black", "X"),
}
_COLUMNS = (
    *("optimizer", "loss", "vs. baseline", "best lr"),
    *("optimizer state", "peak memory", "ms per step"),
)
# Losses further above the best are marked at the top of the plot.
_MAX_GAP = 0.8


def compare_table(found: Comparison) -> RenderableType:
    """Lay the comparison out for the terminal; columns that do not fit go to a second table."""
    columns = list(zip(_COLUMNS, *_rows(found), strict=True))

    def build(width: int) -> RenderableType:
        tables: list[list[tuple[str, ...]]] = [[]]
        for column in columns:
            if sum(map(_width, [*tables[-1], column])) > width:
                tables.append([columns[0]])
            tables[-1].append(column)
        return Group(*map(_table, tables))

    title = f"{found.options.steps} steps, {_seeds(found)}; validation loss in nats per token"
    return Group(Text(title), ByWidth(build))


def _width(column: tuple[str, ...]) -> int:
    """Count the characters of a column, with two of space; the words of a header may wrap."""
    header, *cells = column
    return 2 + max(map(len, [*header.split(), *cells]))


def _table(columns: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0))
    for number, column in enumerate(columns):
        align: Literal["left", "right"] = "right" if number else "left"
        table.add_column(column[0], justify=align, width=_width(column) - 1)
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*row)
    return table


def write_comparison(found: Comparison, folder: Path, *, command: str, seed: int) -> Sequence[Path]:
    """Write `compare.md` and `compare.png`.

    Args:
        found: The comparison.
        folder: Where to; it exists.
        command: The command line that made it.
        seed: The first seed.

    Returns:
        The paths of the two files.
    """
    page, picture = folder / "compare.md", folder / "compare.png"
    save(draw_comparison(found), picture)
    write_text(page, _page(found, command, seed, picture.name))
    return page, picture


def _page(found: Comparison, command: str, seed: int, picture: str) -> str:
    steps = found.options.steps
    baseline = found.baseline
    notes = [
        f"All runs take {steps} steps with a complete schedule, from the same weights and on the "
        f"same batches. Each optimizer tries {MIN_RATES} learning rates a factor of two apart on "
        f"the first seed, and up to {MAX_RATES} while the best is the lowest or highest; the best "
        f"one runs on {_seeds(found)}. The loss is the mean validation loss over the seeds, in "
        "nats per token. The first seed also selected the learning rate, so losses are slightly "
        "optimistic.",
        "No baseline: neither adamw nor split_adamw finished."
        if baseline is None
        else f"The baseline is {baseline.name}, the better of adamw and split_adamw. Differences "
        "are paired over batches and seeds, with 95 % intervals; below zero, the optimizer of the "
        "row is better.",
        "Optimizer state is what the optimizer keeps between steps. Peak memory is measured over "
        "two training steps: on a GPU the allocated memory, on a CPU all tensors, without buffers "
        "inside kernels and with torch.compile off. Time is the median of a training step, forward "
        "and backward included, without the decompositions that galore and fira make every 200 "
        "steps.",
        "apollo is the implementation of pytorch-optimizer, which scales the projected gradient "
        "and projects it back; the paper scales the gradient itself. adam_mini has one second "
        "moment per matrix, except for q and k; the paper's later version has one per row.",
        *(
            f"{result.name}: the best learning rate is the lowest or highest of the {MAX_RATES} "
            "tried; the optimum may lie outside."
            for result in found.results
            if result.is_at_edge
        ),
    ]
    lines = [
        "# Comparison of optimizers",
        "",
        f"- command: `{command}`",
        f"- {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, seed {seed}",
        f"- {machine()}",
        f"- foam-lightning {__version__}, {packages('torch', 'torchao', 'pytorch-optimizer')}",
        "",
        markdown_table(_COLUMNS, _rows(found)),
        "",
        *(line for note in notes for line in (note, "")),
        f"![Validation loss against optimizer state and learning rate]({picture})",
        "",
        "Validation loss on the first seed by learning rate:",
        "",
        markdown_table(("optimizer", "lr: loss"), [(r.name, _grid(r)) for r in found.results]),
    ]
    return "\n".join(lines) + "\n"


def _rows(found: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in found.results:
        profile = found.profiles[result.name]
        rows.append(
            (
                result.name,
                "diverged" if result.has_diverged else f"{result.loss:.4f}",
                _against_baseline(result, found.baseline),
                f"{result.lr:.3g}{' (edge)' if result.is_at_edge else ''}",
                format_bytes(profile.state_bytes),
                format_bytes(profile.peak_bytes),
                f"{profile.step_seconds * 1e3:.3g}",
            )
        )
    return rows


def _against_baseline(result: OptimizerResult, baseline: OptimizerResult | None) -> str:
    if result is baseline:
        return "baseline"
    difference = None if baseline is None else result.against(baseline)
    return "-" if difference is None else str(difference)


def _grid(result: OptimizerResult) -> str:
    return ", ".join(
        f"{lr:.3g}: {f'{loss:.4f}' if math.isfinite(loss) else 'diverged'}"
        for lr, loss in result.losses.items()
    )


def _seeds(found: Comparison) -> str:
    return f"{found.options.seeds} seed{'s' if found.options.seeds > 1 else ''}"


# ---- the plot


def draw_comparison(found: Comparison) -> Figure:
    """Draw validation loss against optimizer state, and against the learning rate.

    Args:
        found: The comparison.
    """
    figure = new_figure(11.0, 5.4)
    left, right = figure.subplots(1, 2)
    _draw_state(left, found)
    _draw_rates(right, found)
    styles = [(result.name, *_STYLES[result.name]) for result in found.results]
    handles = [Line2D([], [], color=c, marker=m, label=name) for name, c, m in styles]
    losses = [loss for result in found.results for loss in result.losses.values()]
    if any(math.isnan(loss) for loss in losses):
        handles.append(Line2D([], [], color=GREY, marker="x", ls="", label="diverged"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw_state(axes: Axes, found: Comparison) -> None:
    axes.set_title(
        f"Best learning rate, {_seeds(found)}, 95 % interval of the difference", fontsize=11
    )
    axes.set_xlabel("optimizer state (MB)")
    axes.set_ylabel("validation loss (nats per token)")
    for result in found.results:
        colour, marker = _STYLES[result.name]
        state = found.profiles[result.name].state_bytes / 1e6
        if result.has_diverged:
            _mark_above(axes, state, colour, "x")
            continue
        difference = result.against(found.baseline) if found.baseline else None
        bar = difference.half_width if difference and result is not found.baseline else None
        axes.errorbar(state, result.loss, bar, color=colour, marker=marker, ms=9, capsize=4)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    add_grid(axes)


def _draw_rates(axes: Axes, found: Comparison) -> None:
    axes.set_title("Every learning rate, first seed", fontsize=11)
    axes.set_xlabel("learning rate")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    finite = [v for result in found.results for v in result.losses.values() if math.isfinite(v)]
    low = min(finite, default=0.0)
    top = min(max(finite, default=1.0), low + _MAX_GAP)
    axes.set_ylim(low - 0.05, top + 0.05)
    for result in found.results:
        colour, marker = _STYLES[result.name]
        axes.plot(*zip(*result.losses.items(), strict=True), color=colour, marker=marker, lw=1.2)
        for lr, loss in result.losses.items():
            if not loss <= top + 0.05:  # NaN too
                _mark_above(axes, lr, colour, "^" if math.isfinite(loss) else "x")
    add_grid(axes)


def _mark_above(axes: Axes, place: float, colour: str, marker: str) -> None:
    """Mark at the top a run whose loss is above the axis (^) or that diverged (x)."""
    edge = axes.get_xaxis_transform()
    axes.plot(place, 0.98, marker=marker, color=colour, ms=7, ls="", transform=edge)
