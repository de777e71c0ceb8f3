"""A comparison as a table in the terminal, as a page, and as a picture."""

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.table import Table

from foam_lightning import __version__
from foam_lightning.storage.atomic import write_text
from foam_lightning.units import format_bytes
from tuner.comparison.compare import MOST_RATES, Comparison, Contender
from tuner.comparison.profile import machine, packages
from tuner.report.style import (
    BLUE,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    PINK,
    RED,
    SKY,
    new_figure,
    save,
)

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
    *("optimizer", "best lr", "validation loss", "to the control"),
    *("state", "peak memory", "step, ms"),
)
# Rates that lose more than this against the best of all are above the scale of the picture.
_SCALE_NATS = 0.8


def compare_table(found: Comparison) -> Table:
    """Lay the comparison out for a terminal."""
    table = Table(*_COLUMNS, title=f"{found.options.steps} steps, {_seeds(found)}")
    for row in _rows(found):
        table.add_row(*row)
    return table


def write_comparison(found: Comparison, folder: Path, *, command: str, seed: int) -> Sequence[Path]:
    """Write `compare.md` and `compare.png`.

    Args:
        found: What was found.
        folder: Where to.
        command: What was typed.
        seed: The first one.

    Returns:
        The two files.
    """
    page, picture = folder / "compare.md", folder / "compare.png"
    save(draw_comparison(found), picture)
    write_text(page, _page(found, command, seed, picture.name))
    return page, picture


def _page(found: Comparison, command: str, seed: int, picture: str) -> str:
    steps = found.options.steps
    notes = [
        f"Every run trains {steps} steps with a complete schedule; all start from the same weights "
        "and see the same batches. Each optimizer takes learning rates a factor of two apart, "
        f"further ones while the best is at an edge, {MOST_RATES} at most, on the first seed; the "
        f"best one is run on {_seeds(found)}. The loss is the mean over the seeds, in nats per "
        "token. Since the first seed also chose the rate, all losses are a little too low.",
        f"The control is {found.control.name}, the better of adamw and split_adamw: differences to "
        "it are paired, over batches and seeds, with 95 % intervals; below zero the row is better."
        if found.control
        else "No control: neither adamw nor split_adamw ran to its end.",
        "State is what the optimizer keeps between steps. Peak memory is of all tensors in two "
        "training steps (on a GPU, what is allocated); on a CPU what a kernel takes inside itself "
        "is not seen, and what torch.compile would fuse is counted operator by operator. The time "
        "is the median of whole training steps, forward and backward pass included, taken in "
        "turns; the decompositions of galore and fira, one every 200 steps, are not in it.",
        "apollo is that of pytorch-optimizer, which scales the projected gradient and projects it "
        "back, where the paper scales the gradient itself; adam_mini has one second moment for "
        "each matrix but q and k, where the paper's later version has one for each row.",
        *(
            f"{one.name}: the best rate is at the edge of the {MOST_RATES} that were tried."
            for one in found.contenders
            if one.is_at_edge
        ),
    ]
    lines = [
        "# Optimizers compared",
        "",
        f"- command: `{command}`",
        f"- {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, seed {seed}",
        f"- {machine()}",
        f"- foam-lightning {__version__}, {packages('torch', 'torchao', 'pytorch-optimizer')}",
        "",
        *_markdown(_COLUMNS, _rows(found)),
        "",
        *(line for note in notes for line in (note, "")),
        f"![Loss against state, and against the learning rate]({picture})",
        "",
        "Loss of the first seed at every rate:",
        "",
        *_markdown(("optimizer", "lr: loss"), [(c.name, _grid(c)) for c in found.contenders]),
    ]
    return "\n".join(lines) + "\n"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def _rows(found: Comparison) -> Sequence[Sequence[str]]:
    rows = []
    for one in found.contenders:
        taken = found.profiles[one.name]
        rows.append(
            (
                one.name,
                f"{one.lr:.3g}{' (at the edge)' if one.is_at_edge else ''}",
                "diverged" if one.has_diverged else f"{one.loss:.4f}",
                _against(one, found.control),
                format_bytes(taken.state_bytes),
                format_bytes(taken.peak_bytes),
                f"{taken.step_seconds * 1e3:.3g}",
            )
        )
    return rows


def _against(one: Contender, control: Contender | None) -> str:
    if one is control:
        return "the control"
    difference = None if control is None else one.against(control)
    return "-" if difference is None else str(difference)


def _grid(one: Contender) -> str:
    return ", ".join(
        f"{lr:.3g}: {f'{loss:.4f}' if math.isfinite(loss) else 'diverged'}"
        for lr, loss in one.losses.items()
    )


def _seeds(found: Comparison) -> str:
    return f"{found.options.seeds} seed{'s' if found.options.seeds > 1 else ''}"


# ---- the picture


def draw_comparison(found: Comparison) -> Figure:
    """Draw the loss against the bytes of state, and against the learning rate.

    The bars on the left are half of the 95 % interval of the difference to the control, which has
    none.

    Args:
        found: What was found.
    """
    figure = new_figure(11.0, 5.4)
    left, right = figure.subplots(1, 2)
    _draw_state(left, found)
    _draw_rates(right, found)
    handles = [
        Line2D([], [], color=_STYLES[one.name][0], marker=_STYLES[one.name][1], label=one.name)
        for one in found.contenders
    ]
    losses = [loss for one in found.contenders for loss in one.losses.values()]
    if any(math.isnan(loss) for loss in losses):
        handles.append(Line2D([], [], color=GREY, marker="x", ls="", label="diverged"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw_state(axes: Axes, found: Comparison) -> None:
    axes.set_title(f"Best rate of each, {_seeds(found)}", fontsize=11)
    axes.set_xlabel("state (MB)")
    axes.set_ylabel("validation loss (nats per token)")
    for one in found.contenders:
        colour, marker = _STYLES[one.name]
        state = found.profiles[one.name].state_bytes / 1e6
        if one.has_diverged:
            _mark_above(axes, state, colour, "x")
            continue
        difference = one.against(found.control) if found.control else None
        bar = difference.half_width if difference and one is not found.control else None
        axes.errorbar(state, one.loss, bar, color=colour, marker=marker, ms=9, capsize=4)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    _grid_lines(axes)


def _draw_rates(axes: Axes, found: Comparison) -> None:
    axes.set_title("Every learning rate, first seed", fontsize=11)
    axes.set_xlabel("learning rate")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    finite = [v for one in found.contenders for v in one.losses.values() if math.isfinite(v)]
    low = min(finite, default=0.0)
    top = min(max(finite, default=1.0), low + _SCALE_NATS)
    axes.set_ylim(low - 0.05, top + 0.05)
    for one in found.contenders:
        colour, marker = _STYLES[one.name]
        axes.plot(*zip(*one.losses.items(), strict=True), color=colour, marker=marker, lw=1.2)
        for lr, loss in one.losses.items():
            if not loss <= top + 0.05:  # NaN too
                _mark_above(axes, lr, colour, "^" if math.isfinite(loss) else "x")
    _grid_lines(axes)


def _mark_above(axes: Axes, place: float, colour: str, marker: str) -> None:
    """Mark at the upper edge what is above the scale (^) or diverged (x)."""
    edge = axes.get_xaxis_transform()
    axes.plot(place, 0.98, marker=marker, color=colour, ms=7, ls="", transform=edge)


def _grid_lines(axes: Axes) -> None:
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
