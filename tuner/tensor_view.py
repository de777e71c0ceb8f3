"""The largest tensors at the peak, as a table for people and as JSON for scripts."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from foam_lightning.memory.inventory import Holding
from foam_lightning.units import in_words


def tensor_table(holdings: Sequence[Holding], most: int) -> Table:
    """Lay the largest tensors out for the terminal, and the rest as one row.

    Args:
        holdings: All of them, the most bytes first.
        most: How many rows to show.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("largest tensors", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("made by", overflow="fold")
    for holding in holdings[:most]:
        origin = holding.origin
        kind = f"{_shape(origin.shape)} {_dtype(holding)}"
        table.add_row(
            in_words(holding.num_bytes),
            f"{holding.count} x {in_words(holding.size)}",
            f"{origin.made_by}\n{holding.term.replace('_', ' ')}, {origin.phase}: {kind}",
        )
    rest = holdings[most:]
    if rest:
        table.add_section()
        num_bytes = sum(holding.num_bytes for holding in rest)
        table.add_row(in_words(num_bytes), "", f"{len(rest)} kinds more")
    return table


def tensors_as_json(holdings: Sequence[Holding], most: int) -> list[dict[str, object]]:
    """Give the largest tensors as JSON has them.

    Args:
        holdings: All of them, the most bytes first.
        most: How many to give.
    """
    return [
        {
            "bytes": holding.num_bytes,
            "count": holding.count,
            "term": holding.term,
            "made_by": holding.origin.made_by,
            "phase": holding.origin.phase,
            "shape": list(holding.origin.shape),
            "dtype": _dtype(holding),
        }
        for holding in holdings[:most]
    ]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _dtype(holding: Holding) -> str:
    return str(holding.origin.dtype).removeprefix("torch.")
