"""Every tensor storage of a run, from its birth to its death, and what was alive at a moment."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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
    """

    terms: Mapping[Term, int]

    @property
    def total_bytes(self) -> int:
        """All bytes alive."""
        return sum(self.terms.values())


class Repeat(NamedTuple):
    """A stretch of the record, between two marks, that happens more often than it was seen."""

    start: str
    stop: str
    times: int


class StorageTracker(TorchDispatchMode):
    """Record the birth and death of every tensor storage while active.

    A storage born now belongs to `term`, the phase the step is in, unless `claim` says otherwise,
    before or after.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.term: Term = "activations"
        self._terms: list[int] = []  # of each storage ever seen, in order of birth
        self._bytes: list[int] = []
        self._changes: list[int] = []  # n: storage n is born; ~n: it dies
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address
        self._marks: dict[str, int] = {}

    def claim(self, tensors: Iterable[Tensor | None], term: Term) -> None:
        """Say what these tensors are, such as gradients; None entries are skipped."""
        for tensor in tensors:
            if tensor is not None:
                self._terms[self._index(tensor)] = TERMS.index(term)

    def mark(self, name: str) -> None:
        """Name this moment; a name that was given before keeps its first moment."""
        self._marks.setdefault(name, len(self._changes))

    def peak(self, repeats: Sequence[Repeat] = ()) -> Moment:
        """Find the moment at which most bytes were alive.

        Weights and optimizer state count as if they had been there from the start: the peak is
        that of any later step.

        Args:
            repeats: Stretches to count `times` over, in order of time and apart from each other.
        """
        alive = self._replay(repeats)
        return _moment(alive[alive.sum(axis=1).argmax()])

    def at(self, name: str, repeats: Sequence[Repeat] = ()) -> list[Moment]:
        """Look at a marked moment, once for each time that it happens, in order of time.

        Args:
            name: The mark.
            repeats: As for `peak`; a mark within one of them happens so many times.
        """
        position, times, length = self._marks[name], 1, 0
        shift = 0
        for repeat in repeats:
            start, stop = self._marks[repeat.start], self._marks[repeat.stop]
            if start < position <= stop:
                times, length = repeat.times, stop - start
            elif position > stop:
                shift += (repeat.times - 1) * (stop - start)
        alive = self._replay(repeats)
        return [_moment(alive[position + shift + time * length]) for time in range(times)]

    def events(self, repeats: Sequence[Repeat] = ()) -> Events:
        """Write out every birth, death and mark, without weights and optimizer state.

        A storage whose life crosses the edge of a repeat stands for one of each time. Which of them
        dies where is then a matter of size: of those of one size the last born dies first, as
        activations do. So every size has its right number of storages alive at every moment.

        Args:
            repeats: As for `peak`.
        """
        pieces = self._pieces(repeats)
        stays = self._within_one_time(pieces)
        marked = defaultdict(list)
        for name, position in self._marks.items():
            marked[position].append(name)
        events = Events()
        alive: defaultdict[int, list[int]] = defaultdict(list)  # by storage, or by ~size
        for start, stop, times in pieces:
            for position in list(range(start, stop)) * times:
                change = self._changes[position]
                index = max(change, ~change)
                if self._terms[index] not in _STANDING:
                    alike = alive[index if index in stays else ~self._bytes[index]]
                    if change >= 0:
                        alike.append(events.bear(self._bytes[index]))
                    else:
                        events.bury(alike.pop())
                events.marks.extend((len(events.changes), name) for name in marked[position + 1])
        return events

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._index(leaf)
        return result

    def _index(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None:
            return known[0]
        index = len(self._terms)
        self._terms.append(TERMS.index(self.term))
        self._bytes.append(storage.nbytes())
        self._changes.append(index)

        def bury(_: object) -> None:
            del self._alive[address]
            self._changes.append(~index)

        self._alive[address] = (index, weakref.ref(storage, bury))
        return index

    def _replay(self, repeats: Sequence[Repeat]) -> npt.NDArray[np.int64]:
        """Give the bytes alive before the first change and after each, (1 + changes, terms)."""
        births = np.array(self._changes, dtype=np.int64)
        index = np.where(births >= 0, births, ~births)
        terms, sizes = np.array(self._terms)[index], np.array(self._bytes)[index]
        deltas = np.zeros((len(births), len(TERMS)), dtype=np.int64)
        deltas[np.arange(len(births)), terms] = np.where(births >= 0, sizes, -sizes)
        standing = np.zeros(len(TERMS), dtype=np.int64)
        for term in _STANDING:
            standing[term] = deltas[births >= 0, term].sum()
            deltas[:, term] = 0
        pieces = [np.tile(deltas[start:stop], (n, 1)) for start, stop, n in self._pieces(repeats)]
        alive: npt.NDArray[np.int64] = np.cumsum(np.concatenate([standing[None], *pieces]), axis=0)
        return alive

    def _pieces(self, repeats: Sequence[Repeat]) -> list[tuple[int, int, int]]:
        """Cut the changes at the edges of the repeats: start, stop, and how often it happens."""
        pieces, done = [], 0
        for repeat in repeats:
            start, stop = self._marks[repeat.start], self._marks[repeat.stop]
            pieces += [(done, start, 1), (start, stop, repeat.times)]
            done = stop
        return [*pieces, (done, len(self._changes), 1)]

    def _within_one_time(self, pieces: Sequence[tuple[int, int, int]]) -> set[int]:
        """Find the storages that no edge of a repeat comes between, from birth to death."""
        place = {}  # of a change: the repeat that it is in, or none
        for number, (start, stop, times) in enumerate(pieces):
            for change in self._changes[start:stop]:
                place[change] = number if times > 1 else None
        return {n for n in place if n >= 0 and place[n] == place.get(~n, place[n])}


def _moment(row: npt.NDArray[np.int64]) -> Moment:
    return Moment({term: int(size) for term, size in zip(TERMS, row, strict=True)})
