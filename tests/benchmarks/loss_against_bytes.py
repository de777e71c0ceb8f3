"""Draw validation loss against optimizer state from a committed page of `tests.benchmarks.tuned`.

python -m tests.benchmarks.loss_against_bytes [--page FILE] [--output FILE]
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foam_lightning.units import ByteSize
from tests.benchmarks.heading import ROOT
from tuner.report.style import BLUE, GREY, ORANGE, RED, add_grid, new_figure, save
from tuner.trials.runner import Difference

PAGE = ROOT / "tests/benchmarks/results/tuned_larger_2026-11.md"
IMAGE = ROOT / "docs/images/loss_against_bytes.png"


@dataclass(frozen=True)
class Point:
    """A row of the table.

    Attributes:
        share: Its optimizer state as a share of Adam's.
        state_bytes: Its optimizer state.
        loss: Mean validation loss over the seeds, in nats per token.
        to_adam: Its loss minus that of the best Adam, with the 95 % interval.
    """

    share: float
    state_bytes: int
    loss: float
    to_adam: Difference


def read_points(page: str) -> dict[str, list[Point]]:
    """Read Adams, uniform levels and tuned plans from a page, most state first."""
    found: dict[str, list[Point]] = {"Adam": [], "uniform": [], "tuned": []}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not re.fullmatch(r"[0-9.]+", cells[0]):
            continue
        *_, loss, to_adam, _ = cells
        mean, half_width = re.split(r"\+-|±", to_adam) if to_adam != "0" else ("0", "0")
        difference = Difference(float(mean), float(half_width))
        point = Point(float(cells[0]), ByteSize(cells[4]), float(loss), difference)
        if point.share == 1:
            found["Adam"].append(point)
        elif cells[1].startswith("uniform"):
            found["uniform"].append(point)
        elif cells[1].startswith("**mixed"):
            found["tuned"].append(point)
    return found


def draw(page: str) -> Figure:
    """Draw the points of a page, with the loss of the best Adam as a line across."""
    points = read_points(page)
    adam = min(points["Adam"], key=lambda point: point.loss)
    run = re.search(r"full runs of (\d+) steps on seeds 0 to (\d+)", page)
    assert run is not None
    weights = adam.state_bytes / 8  # two moments in float32
    figure = new_figure(8.4, 4.6)
    figure.suptitle("Validation loss against optimizer state", fontsize=13, fontweight="bold")
    axes = figure.add_subplot()
    axes.set_title(
        f"LLaMA with {weights / 1e6:.1f}M parameters in its matrices, {run[1]} steps, mean of "
        f"{int(run[2]) + 1} seeds",
        fontsize=10.5,
    )
    axes.axhline(adam.loss, color=RED, linestyle="--", linewidth=1.2, zorder=1)
    axes.plot(adam.share, adam.loss, "*", color=RED, ms=18)
    _label(axes, adam, f"Adam, best of\n{len(points['Adam'])} settings", RED, (0, 13))
    for name, marker, colour, text_colour, text in (
        ("uniform", "o", BLUE, BLUE, "FOAM, the same level\nfor every matrix"),
        ("tuned", "D", ORANGE, "#A66F00", "FOAM, a level per matrix\nfound by the tuner"),
    ):
        of_kind = points[name]
        axes.errorbar(
            [p.share for p in of_kind],
            [p.loss for p in of_kind],
            [p.to_adam.half_width for p in of_kind],
            marker=marker,
            ms=9,
            color=colour,
            capsize=4,
            linewidth=1.5,
        )
        _label(axes, of_kind[0], text, text_colour, (14, 0))
        for point in of_kind:
            low = point.loss - point.to_adam.half_width
            axes.annotate(
                str(point.to_adam),
                (point.share, low),
                xytext=(0, -5),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=9,
                color=text_colour,
            )
    shown = sorted({(p.share, p.state_bytes) for p in (adam, *points["uniform"])})
    axes.set_xscale("log", base=2)
    axes.set_xlim(shown[0][0] / 1.4, 1.7)
    axes.set_xticks(
        [share for share, _ in shown],
        [f"{size / 1e6:.3g} MB\n({_fraction(share)})" for share, size in shown],
    )
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.set_xlabel("optimizer state of the matrices (share of Adam's)")
    axes.set_ylabel("validation loss (nats per token)")
    figure.supxlabel(
        "Numbers and bars: difference to Adam on the same batches, with its 95 % interval",
        fontsize=9,
        color=GREY,
    )
    add_grid(axes)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(axes: Axes, point: Point, text: str, colour: str, offset: tuple[int, int]) -> None:
    right, up = offset
    axes.annotate(
        text,
        (point.share, point.loss),
        xytext=offset,
        textcoords="offset points",
        ha="left" if right else "center",
        va="bottom" if up else "center",
        fontsize=11,
        fontweight="bold",
        color=colour,
    )


def _fraction(share: float) -> str:
    return "Adam" if share == 1 else f"1/{1 / share:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--output", type=Path, default=IMAGE)
    arguments = parser.parse_args()
    save(draw(arguments.page.read_text(encoding="utf-8")), arguments.output)


if __name__ == "__main__":
    main()
