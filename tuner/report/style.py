"""What all pictures share: the sheet, the colours, and the file."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from foam_lightning.storage.atomic import atomic_path

# The palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, YELLOW, PINK, GREY = "#56B4E9", "#F0E442", "#CC79A7", "#666666"
GRID = "#E5E5E5"


def new_figure(width: float, height: float) -> Figure:
    """Make an empty sheet.

    Args:
        width: In inches.
        height: The same.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def ink_on(colour: str | tuple[float, float, float, float]) -> str:
    """Choose black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
