"""What was alive at every moment of a step, with stretches of it repeated for all layers."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

from foam_lightning.memory.allocator import Events

Term = Literal["weights", "gradients", "optimizer_state", "activations", "loss", "workspace"]
TERMS: tuple[Term, ...] = get_args(Term)
# These count as if they had been there from the start of the step.
_PERSISTENT = (TERMS.index("weights"), TERMS.index("optimizer_state"))


@dataclass(frozen=True)
class Moment:
    """What was alive at one moment.

    Attributes:
        terms: Bytes by term.
        time: Number of allocations and frees before it, at full depth.
    """

    terms: Mapping[Term, int]
    time: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes alive."""
        return sum(self.terms.values())


class Repeat(NamedTuple):
    """A stretch of the record, between two marks, that stands for several."""

    start: str
    stop: str
    times: int


class Origin(NamedTuple):
    """Where a storage comes from.

    Attributes:
        made_by: The module that ran, or the name of the parameter that it belongs to.
        phase: The phase of the step, such as "backward".
        shape: Shape of its first tensor.
        dtype: Dtype of the same.
    """

    made_by: str
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Record:
    """Every storage in order of allocation, and when it was allocated and freed.

    Attributes:
        terms: Index in `TERMS` of the term of each storage.
        sizes: Bytes of each storage.
        origins: Where each storage comes from; empty if not recorded.
        changes: n: storage n is allocated; ~n: it is freed.
        marks: Named moments: the number of changes before each.
    """

    terms: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)


class Timeline:
    """A finished record at full depth.

    Weights and optimizer state count as if they had been there from the start, so that this step
    stands for any later one.

    Args:
        record: The record.
        repeats: Stretches to count several times, in order of time and not overlapping.
    """

    def __init__(self, record: Record, repeats: Sequence[Repeat] = ()) -> None:
        self.record = record
        self._repeats = repeats
        self._pieces, done = [], 0  # start, stop, times
        for repeat in repeats:
            start, stop = record.marks[repeat.start], record.marks[repeat.stop]
            self._pieces += [(done, start, 1), (start, stop, repeat.times)]
            done = stop
        self._pieces.append((done, len(record.changes), 1))

    def peak(self) -> Moment:
        """Find the moment with the most bytes alive."""
        return self._moment(int(self._alive.sum(axis=1).argmax()))

    def at(self, name: str) -> list[Moment]:
        """Return a marked moment, once for each time that it happens, in order of time."""
        marks = self.record.marks
        position, times, length, shift = marks[name], 1, 0, 0
        for repeat in self._repeats:
            start, stop = marks[repeat.start], marks[repeat.stop]
            if start < position <= stop:
                times, length = repeat.times, stop - start
            elif position > stop:
                shift += (repeat.times - 1) * (stop - start)
        return [self._moment(position + shift + time * length) for time in range(times)]

    def count_alive(self, time: int) -> Counter[int]:
        """Count how many of each storage are alive at a moment.

        There are several of a storage that is allocated in one repeated stretch and freed in
        another. Where a storage is allocated outside a stretch and one like it is freed inside, a
        count may be below 0 and the other too high by as much: only sums over equal storages count.

        Args:
            time: The time of a `Moment`.

        Returns:
            The count by number in the record.
        """
        record = self.record
        counts = Counter(n for n, term in enumerate(record.terms) if term in _PERSISTENT)
        for start, stop, times in self._pieces:
            length = stop - start
            whole = min(times, time // length) if length else 0
            rest = min(length, time - whole * length) if whole < times else 0
            time -= whole * length + rest
            for position in range(start, stop):
                change = record.changes[position]
                index = max(change, ~change)
                if record.terms[index] not in _PERSISTENT:
                    happened = whole + (position - start < rest)
                    counts[index] += happened if change >= 0 else -happened
        return counts

    def events(self) -> Events:
        """List every allocation, free and mark at full depth, without weights and optimizer state.

        A storage that outlives its repeated stretch stands for one of each time. Of such storages
        of one size, the last one allocated is freed first, as activations are. So every size has
        its right number of storages alive at every moment.
        """
        record = self.record
        stays = self._within_one_repeat()
        marked = defaultdict(list)
        for name, position in record.marks.items():
            marked[position].append(name)
        events = Events()
        alive: defaultdict[int, list[int]] = defaultdict(list)  # by storage, or by ~size
        for start, stop, times in self._pieces:
            for position in list(range(start, stop)) * times:
                change = record.changes[position]
                index = max(change, ~change)
                if record.terms[index] not in _PERSISTENT:
                    size = record.sizes[index]
                    alike = alive[index if index in stays else ~size]
                    if change >= 0:
                        alike.append(events.allocate(size))
                    else:
                        events.free(alike.pop())
                events.marks.extend((len(events.changes), name) for name in marked[position + 1])
        return events

    @cached_property
    def _alive(self) -> npt.NDArray[np.int64]:
        """The bytes alive before the first change and after each, (1 + changes, terms)."""
        changes = np.array(self.record.changes, dtype=np.int64)
        index = np.where(changes >= 0, changes, ~changes)
        terms, sizes = np.array(self.record.terms)[index], np.array(self.record.sizes)[index]
        deltas = np.zeros((len(changes), len(TERMS)), dtype=np.int64)
        deltas[np.arange(len(changes)), terms] = np.where(changes >= 0, sizes, -sizes)
        persistent = np.zeros(len(TERMS), dtype=np.int64)
        for term in _PERSISTENT:
            persistent[term] = deltas[changes >= 0, term].sum()
            deltas[:, term] = 0
        pieces = [np.tile(deltas[start:stop], (n, 1)) for start, stop, n in self._pieces]
        alive: npt.NDArray[np.int64] = np.cumsum(
            np.concatenate([persistent[None], *pieces]), axis=0
        )
        return alive

    def _moment(self, time: int) -> Moment:
        row = self._alive[time]
        return Moment({term: int(size) for term, size in zip(TERMS, row, strict=True)}, time)

    def _within_one_repeat(self) -> set[int]:
        """Find the storages that are allocated and freed within one repeat, or outside of all."""
        place = {}  # of a change: the repeat that it is in, or none
        for number, (start, stop, times) in enumerate(self._pieces):
            for change in self.record.changes[start:stop]:
                place[change] = number if times > 1 else None
        return {n for n in place if n >= 0 and place[n] == place.get(~n, place[n])}
