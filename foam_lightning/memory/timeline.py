"""What was alive at every moment of a step, with stretches of it repeated to its full depth."""

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
# What lives from the first step to the last counts as if it had been there from the start.
_STANDING = (TERMS.index("weights"), TERMS.index("optimizer_state"))


@dataclass(frozen=True)
class Moment:
    """What was alive at one moment.

    Attributes:
        terms: Bytes by term.
        time: Births and deaths before it, at full depth.
    """

    terms: Mapping[Term, int]
    time: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes alive."""
        return sum(self.terms.values())


class Repeat(NamedTuple):
    """A stretch of the record, between two marks, that happens more often than it was seen."""

    start: str
    stop: str
    times: int


class Origin(NamedTuple):
    """Where a storage comes from.

    Attributes:
        made_by: The module that ran, or the name of the parameter that it belongs to.
        phase: What the step was doing, such as "backward".
        shape: Of the tensor that it was born with.
        dtype: Of the same.
    """

    made_by: str
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Record:
    """Every storage that was seen, in order of birth, and when it was born and died.

    Attributes:
        terms: Index of the term of each storage.
        sizes: Bytes of each.
        origins: Where each comes from; empty where nobody asked.
        changes: n: storage n is born; ~n: it dies.
        marks: Named moments: how many changes come before.
    """

    terms: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)


class Timeline:
    """A record at full depth; it must not change any more.

    Weights and optimizer state count as if they had been there from the start: what holds for this
    step holds for any later one.

    Args:
        record: What was seen.
        repeats: Stretches to count `times` over, in order of time and apart from each other.
    """

    def __init__(self, record: Record, repeats: Sequence[Repeat] = ()) -> None:
        self.record = record
        self._repeats = repeats
        self._pieces, done = [], 0  # start, stop, and how often what is between happens
        for repeat in repeats:
            start, stop = record.marks[repeat.start], record.marks[repeat.stop]
            self._pieces += [(done, start, 1), (start, stop, repeat.times)]
            done = stop
        self._pieces.append((done, len(record.changes), 1))

    def peak(self) -> Moment:
        """Find the moment at which most bytes were alive."""
        return self._moment(int(self._alive.sum(axis=1).argmax()))

    def at(self, name: str) -> list[Moment]:
        """Look at a marked moment, once for each time that it happens, in order of time."""
        marks = self.record.marks
        position, times, length, shift = marks[name], 1, 0, 0
        for repeat in self._repeats:
            start, stop = marks[repeat.start], marks[repeat.stop]
            if start < position <= stop:
                times, length = repeat.times, stop - start
            elif position > stop:
                shift += (repeat.times - 1) * (stop - start)
        return [self._moment(position + shift + time * length) for time in range(times)]

    def holdings(self, time: int) -> Counter[int]:
        """Count how many of each storage are alive at a moment.

        Of a storage that is born in one repeated stretch and dies in another there are several.
        Where one is born outside and a like one dies inside, the count of the one may be below
        zero, and that of the other too high by as much: only sums over what is alike mean anything.

        Args:
            time: As `Moment` has it.

        Returns:
            The count by number in the record.
        """
        record = self.record
        counts = Counter(n for n, term in enumerate(record.terms) if term in _STANDING)
        for start, stop, times in self._pieces:
            length = stop - start
            whole = min(times, time // length) if length else 0
            rest = min(length, time - whole * length) if whole < times else 0
            time -= whole * length + rest
            for position in range(start, stop):
                change = record.changes[position]
                index = max(change, ~change)
                if record.terms[index] not in _STANDING:
                    happened = whole + (position - start < rest)
                    counts[index] += happened if change >= 0 else -happened
        return counts

    def events(self) -> Events:
        """Write out every birth, death and mark, without weights and optimizer state.

        A storage whose life crosses the edge of a repeat stands for one of each time. Which of them
        dies where is then a matter of size: of those of one size the last born dies first, as
        activations do. So every size has its right number of storages alive at every moment.
        """
        record = self.record
        stays = self._within_one_time()
        marked = defaultdict(list)
        for name, position in record.marks.items():
            marked[position].append(name)
        events = Events()
        alive: defaultdict[int, list[int]] = defaultdict(list)  # by storage, or by ~size
        for start, stop, times in self._pieces:
            for position in list(range(start, stop)) * times:
                change = record.changes[position]
                index = max(change, ~change)
                if record.terms[index] not in _STANDING:
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
        births = np.array(self.record.changes, dtype=np.int64)
        index = np.where(births >= 0, births, ~births)
        terms, sizes = np.array(self.record.terms)[index], np.array(self.record.sizes)[index]
        deltas = np.zeros((len(births), len(TERMS)), dtype=np.int64)
        deltas[np.arange(len(births)), terms] = np.where(births >= 0, sizes, -sizes)
        standing = np.zeros(len(TERMS), dtype=np.int64)
        for term in _STANDING:
            standing[term] = deltas[births >= 0, term].sum()
            deltas[:, term] = 0
        pieces = [np.tile(deltas[start:stop], (n, 1)) for start, stop, n in self._pieces]
        alive: npt.NDArray[np.int64] = np.cumsum(np.concatenate([standing[None], *pieces]), axis=0)
        return alive

    def _moment(self, time: int) -> Moment:
        row = self._alive[time]
        return Moment({term: int(size) for term, size in zip(TERMS, row, strict=True)}, time)

    def _within_one_time(self) -> set[int]:
        """Find the storages that no edge of a repeat comes between, from birth to death."""
        place = {}  # of a change: the repeat that it is in, or none
        for number, (start, stop, times) in enumerate(self._pieces):
            for change in self.record.changes[start:stop]:
                place[change] = number if times > 1 else None
        return {n for n in place if n >= 0 and place[n] == place.get(~n, place[n])}
