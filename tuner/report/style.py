"""What all plots share: the figure, the colours, and how the file is written."""

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from foam_lightning.storage.atomic import atomic_path

# Okabe and Ito's palette, safe for the colour-blind: jfly.uni-koeln.de/color.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, YELLOW, PINK, GREY = "#56B4E9", "#F0E442", "#CC79A7", "#666666"


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure.

    Args:
        width: In inches.
        height: In inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def add_grid(axes: Axes, axis: Literal["x", "both"] = "both") -> None:
    """Draw grid lines behind the data."""
    axes.grid(axis=axis, color="#E5E5E5")
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically, at 150 dots per inch."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def text_colour_on(background: str | tuple[float, float, float, float]) -> str:
    """Choose black or white text, whichever reads better on a background."""
    red, green, blue = to_rgb(background)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
