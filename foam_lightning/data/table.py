"""Rows of prepared data, memory-mapped from Arrow files and read by index.

The few methods of `datasets.Dataset` that local files need, so that only datasets of the Hugging
Face Hub need the package datasets.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch.utils.data import Dataset


class Table(Dataset[Any]):
    """All rows of Arrow files, or some of them in any order.

    A pickled table holds the paths instead of the content, so every worker maps the same files.

    Args:
        parts: Files in the streaming format of Arrow, or tables in memory, one after the other.
        order: Indices of the rows; None means all, in the order stored.

    Raises:
        pa.ArrowException: A file is damaged.
        OSError: A file cannot be read.
    """

    def __init__(
        self, parts: Sequence["Path | pa.Table"], order: "range | NDArray[np.int64] | None" = None
    ) -> None:
        self._parts = parts
        tables = [_open(part) if isinstance(part, Path) else part for part in parts]
        self.schema: pa.Schema = tables[0].schema
        self._batches = [batch for table in tables for batch in table.to_batches()]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._order = range(self._starts[-1]) if order is None else order

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> Self:
        """Create a table in memory with one column, "text"."""
        schema = pa.schema([("text", pa.large_string())])
        return cls.from_rows([{"text": text} for text in texts], schema)

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> Self:
        """Create a table in memory."""
        return cls([pa.Table.from_pylist(rows, schema)])

    @classmethod
    def concatenate(cls, tables: Sequence["Table"]) -> Self:
        """Put the rows of several tables one after the other, without copying them."""
        starts = np.cumsum([0, *(table._starts[-1] for table in tables)])[:-1]
        orders = [
            np.asarray(table._order) + start for table, start in zip(tables, starts, strict=True)
        ]
        return cls([part for table in tables for part in table._parts], np.concatenate(orders))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._parts, self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        """Return a row as a dict by column; lists are arrays, which the caller may change."""
        return {name: _value(scalar) for name, scalar in self._scalars(index)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield the columns of consecutive rows, `batch_size` at a time, all as lists."""
        for start, stop in pairwise([*range(0, len(self), batch_size), len(self)]):
            columns: dict[str, list[Any]] = {name: [] for name in self.schema.names}
            for index in range(start, stop):
                for name, scalar in self._scalars(index):
                    columns[name].append(scalar.as_py())
            yield columns

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of numbers as an array."""
        stored = [batch.column(name).to_numpy() for batch in self._batches]
        values: NDArray[Any] = np.concatenate(stored) if stored else np.empty(0)
        return values[np.asarray(self._order, dtype=np.int64)]

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "Table":
        """Return the rows with these indices, without copying them."""
        if isinstance(self._order, range) and isinstance(indices, range):
            order: Any = self._order[indices.start : indices.stop : indices.step]
        else:
            order = np.asarray(self._order)[np.asarray(indices, dtype=np.int64)]
        return Table(self._parts, order)

    def _scalars(self, index: int) -> Iterator[tuple[str, Any]]:
        stored = self._order[index]
        number = int(np.searchsorted(self._starts, stored, side="right")) - 1
        batch, at = self._batches[number], int(stored - self._starts[number])
        return ((name, batch.column(name)[at]) for name in batch.schema.names)


def _open(path: Path) -> pa.Table:
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        return reader.read_all()


def _value(scalar: Any) -> Any:
    is_list = isinstance(scalar, pa.ListScalar) and scalar.is_valid
    return np.array(scalar.values) if is_list else scalar.as_py()
