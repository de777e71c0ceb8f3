"""A replay of torch's CUDA caching allocator: the bytes that it reserves for a run.

The rules and sizes are those of torch's CUDACachingAllocator (c10/cuda/CUDACachingAllocator.cpp) at
its default settings: a request is rounded up to 512 bytes; one of up to 1 MiB is served from the
small pool, whose segments are of 2 MiB, any other from the large pool, whose segments are of 20 MiB
below 10 MiB and else of the request rounded up to 2 MiB. The smallest free block that is large
enough is taken, and split if the rest is large enough; free neighbours in a segment are merged.
A reserved segment is kept. Not replayed: other streams than the first, and that a device without
room for a new segment first frees unused ones, so that a run may need less.

With expandable segments a pool is one segment that grows. The fraction of a card that torch limits
a process to holds for them too, and the reserved bytes are those that are mapped
(DeviceCachingAllocator::alloc_block and map_block). Near that limit the whole request has to fit,
though a part of it may be mapped already; if it does not, free pages are unmapped first, which is
counted as a retry.
"""

import math
import os
import re
import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from foam_lightning.plan import FoldPlan, MemoryOptions

MiB = 2**20
_ROUNDING = 512
_MAX_SMALL = MiB
_SMALL_SEGMENT = 2 * MiB
_LARGE_SEGMENT = 20 * MiB
_MIN_OWN_SEGMENT = 10 * MiB
_OWN_SEGMENT_ROUNDING = 2 * MiB

END_OF_BACKWARD = "end of backward"  # a mark, followed by the number of the micro-batch


# The variables that set up the allocator, in the order in which torch 2.11 to 2.13 look for them
# (c10/cuda/CUDAAllocatorConfig.h): the first that is set is the only one that is read.
_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_EXPANDABLE = "expandable_segments:True"


def set_expandable_segments() -> None:
    """Turn on expandable segments for this process and its children, unless the user set something.

    Call it before the first tensor on a GPU, when torch reads the setting. Windows does not have
    them, and there torch would warn.
    """
    if not any(name in os.environ for name in _VARIABLES) and sys.platform != "win32":
        os.environ["PYTORCH_ALLOC_CONF"] = _EXPANDABLE


def has_expandable_segments() -> bool:
    """Return whether the environment turns expandable segments on, for the run that is planned."""
    found = next((os.environ[name] for name in _VARIABLES if name in os.environ), "")
    settings = re.findall(r"expandable_segments:(True|False)", found.replace(" ", ""))
    return settings[-1:] == ["True"]


@dataclass(frozen=True)
class Events:
    """Allocations and frees in order of time.

    Attributes:
        sizes: Bytes of every block, in order of allocation.
        changes: n where block n is allocated, ~n where it is freed.
        marks: Named moments: the number of changes before each, and its name.
    """

    sizes: list[int] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def allocate(self, size: int) -> int:
        """Add the allocation of a block and return its number."""
        self.changes.append(len(self.sizes))
        self.sizes.append(size)
        return self.changes[-1]

    def free(self, block: int) -> None:
        """Add the free of a block."""
        self.changes.append(~block)


class AllocatorPeaks(NamedTuple):
    """The peaks of the allocator's counters, each at its own moment, under torch's names.

    Attributes:
        requested: Bytes of the blocks that were requested.
        allocated: Bytes of the blocks that were allocated, rounded up.
        reserved: Bytes of the segments that hold them.
    """

    requested: int
    allocated: int
    reserved: int


def replay(events: Events, *, expandable: bool = False) -> AllocatorPeaks:
    """Replay allocations and frees, starting with an empty allocator.

    Args:
        events: The requests; a block of 0 bytes needs no memory.
        expandable: Replay `expandable_segments`: a pool is one segment that grows at its end, by
            pages of 2 MiB or 20 MiB, and any free part of it serves any size.
    """
    small, large = _Pool(is_small=True, expandable=expandable), _Pool(False, expandable)
    alive: dict[int, tuple[_Pool, _Block]] = {}
    sizes = events.sizes
    requested = allocated = most_requested = most_allocated = 0
    for change in events.changes:  # a plan replays hundreds of thousands
        number = change if change >= 0 else ~change
        size = sizes[number]
        if size == 0:
            continue
        if change >= 0:
            rounded = _round_up(size, _ROUNDING)
            pool = small if rounded <= _MAX_SMALL else large
            block = pool.allocate(rounded)
            alive[number] = pool, block
            requested += size
            allocated += block.size
            if requested > most_requested:
                most_requested = requested
            if allocated > most_allocated:
                most_allocated = allocated
        else:
            pool, block = alive.pop(number)
            requested -= size
            allocated -= block.size
            pool.free(block)
    return AllocatorPeaks(most_requested, most_allocated, small.reserved + large.reserved)


def two_steps(weights: Iterable[int], step: Events, updates: Sequence["ParameterUpdate"]) -> Events:
    """List the events of two optimizer steps; the first creates the state, later ones are alike.

    Args:
        weights: Bytes of every parameter; they are allocated first.
        step: Forward and backward passes of one step. A mark "update i" is where parameter i is
            updated inside backward; without such marks all are updated at the last mark
            `END_OF_BACKWARD`, or else at the end, in their order. What is still alive at the end,
            such as gradients, is freed.
        updates: One per parameter in the order of the marks' i. Where they have sums in host
            memory, those come at the marks, and the updates are at the last `END_OF_BACKWARD`.
    """
    events = Events()
    for size in weights:
        events.allocate(size)
    inside = [(at, int(name.split()[1])) for at, name in step.marks if name.startswith("update ")]
    num_traced = max((index + 1 for _, index in inside), default=0)
    missing = len(updates) - num_traced
    # Layers are alike: the first half is counted from the front, the rest from the back.
    inside = [(at, i if 2 * i < num_traced else i + missing) for at, i in inside]
    whole = len(step.changes)
    ends = [at for at, name in step.marks if name.startswith(END_OF_BACKWARD)]
    after = ends[-1] if ends else whole
    at_end = [(after, i) for i in range(len(updates))]
    sums_at = inside if any(update.sum_from_host for update in updates) else []
    order = [
        *((at, updates[i].sum_from_host, ()) for at, i in sums_at),
        *(
            (at, updates[i].workspace, updates[i].state)
            for at, i in (not sums_at and inside) or at_end
        ),
        (whole, 0, ()),
    ]
    for is_first in (True, False):
        alive: dict[int, int] = {}  # block of the step: block of the run
        done = 0
        for at, workspace, state in order:
            for change in step.changes[done:at]:
                if change >= 0:
                    alive[change] = events.allocate(step.sizes[change])
                else:
                    events.free(alive.pop(~change))
            done = at
            for size in state if is_first else ():
                events.allocate(size)
            if workspace:
                events.free(events.allocate(workspace))
        for block in alive.values():
            events.free(block)
    return events


class ParameterUpdate(NamedTuple):
    """What the update of one parameter needs.

    Attributes:
        state: Bytes of every tensor of its state.
        workspace: Peak of the bytes of its temporaries; they count as one block.
        sum_from_host: Bytes of the sum of its gradients, which comes from host memory whenever a
            gradient is added to it; 0 if there is none.
    """

    state: tuple[int, ...]
    workspace: int
    sum_from_host: int = 0


class _Block:
    """A part of a segment, allocated or free, with its neighbours in the segment."""

    __slots__ = ("address", "after", "before", "is_free", "size")

    def __init__(self, size: int, address: int) -> None:
        self.size = size
        self.address = address
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.is_free = False


class _Pool:
    """The segments of one pool, and its free blocks."""

    def __init__(self, is_small: bool, expandable: bool) -> None:
        self.reserved = 0
        self._page = _SMALL_SEGMENT if is_small else _LARGE_SEGMENT
        # A smaller rest stays part of the block.
        self._min_rest = _ROUNDING if is_small or expandable else _MAX_SMALL + 1
        self._expandable = expandable
        self._last: _Block | None = None  # in the expandable segment
        self._order: list[tuple[int, int]] = []  # of free blocks: size, address
        self._free_blocks: dict[int, _Block] = {}  # by address

    def allocate(self, size: int) -> _Block:
        """Allocate a block of at least `size` bytes, a multiple of 512."""
        best = bisect_left(self._order, (size, -1))
        if best < len(self._order):
            # The end of an expandable segment counts as large as it may grow, so it comes last.
            is_end = self._free_blocks[self._order[best][1]] is self._last
            if is_end and self._expandable and best + 1 < len(self._order):
                best += 1
            block = self._free_blocks.pop(self._order.pop(best)[1])
        else:
            block = self._grow(size) if self._expandable else self._new_segment(size)
        block.is_free = False
        if block.size - size >= self._min_rest:
            rest = _Block(block.size - size, block.address + size)
            rest.before, rest.after = block, block.after
            if block.after is not None:
                block.after.before = rest
            if block is self._last:
                self._last = rest
            block.after, block.size = rest, size
            self._add(rest)
        return block

    def free(self, block: _Block) -> None:
        """Free a block and merge it with its free neighbours."""
        if block.before is not None and block.before.is_free:
            block = self._merge(block.before, block)
        if block.after is not None and block.after.is_free:
            block = self._merge(block, block.after)
        self._add(block)

    def _new_segment(self, size: int) -> _Block:
        length = self._page if size < _MIN_OWN_SEGMENT else _round_up(size, _OWN_SEGMENT_ROUNDING)
        # Blocks of one size are ordered by address, as on a device.
        block = _Block(length, self.reserved)
        self.reserved += length
        return block

    def _grow(self, size: int) -> _Block:
        last = self._last
        missing = size - (last.size if last is not None and last.is_free else 0)
        pages = _Block(_round_up(missing, self._page), self.reserved)
        self.reserved += pages.size
        pages.before = last
        if last is not None:
            last.after = pages
            if last.is_free:
                pages = self._merge(last, pages)
        self._last = pages
        return pages

    def _merge(self, first: _Block, second: _Block) -> _Block:
        for block in (first, second):
            if block.is_free:
                self._remove(block)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if second is self._last:
            self._last = first
        return first

    def _add(self, block: _Block) -> None:
        block.is_free = True
        self._free_blocks[block.address] = block
        insort(self._order, (block.size, block.address))

    def _remove(self, block: _Block) -> None:
        block.is_free = False
        del self._free_blocks[block.address]
        del self._order[bisect_left(self._order, (block.size, block.address))]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# The uniform levels at which the allocator is replayed; they differ in their state.
_REPLAYED_LEVELS = (8, 4, 3, 2, 1, 0)


class AllocatorMargin:
    """What the allocator reserves beyond the tensors of a plan, from replays at uniform levels.

    This excess is not monotonic in the level. The margin of a plan is the largest excess at any
    replayed level with at most as much state, interpolated between two of them, so that less state
    never needs more memory.

    Args:
        replay_plan: Replays the allocator for a plan whose layers all have the same levels.
        state_bytes: Counts the optimizer state of a plan.
        workspace: Bytes that libraries take from the allocator, the same for every plan.
    """

    def __init__(
        self,
        replay_plan: Callable[[FoldPlan], AllocatorPeaks],
        state_bytes: Callable[[FoldPlan], int],
        workspace: int,
    ) -> None:
        self._replay_plan = replay_plan
        self._state_bytes = state_bytes
        self._workspace = workspace
        self._excesses: dict[tuple[MemoryOptions, int], int] = {}

    def bytes_for(self, plan: FoldPlan) -> int:
        """Return the margin of a plan in bytes."""
        state = self._state_bytes(plan)
        return math.ceil(np.interp(state, *self._points(plan, state)))

    def state_change(self, plan: FoldPlan, change_bytes: int) -> int:
        """Convert a change of state and margin together into the change of the state alone.

        Args:
            plan: The plan before the change.
            change_bytes: The change of both in bytes; below 0 they shrink.
        """
        state = self._state_bytes(plan)
        states, margins = self._points(plan, math.inf)
        sums = np.add(states, margins)
        target = state + np.interp(state, states, margins) + change_bytes
        # Beyond the ends the margin is constant.
        beyond = min(target - sums[0], 0) + max(target - sums[-1], 0)
        return math.floor(float(np.interp(target, sums, states) + beyond)) - state

    def _points(self, plan: FoldPlan, most: float) -> tuple[list[int], list[int]]:
        """Return state and margin at uniform levels, the highest first, up to `most` of state."""
        states: list[int] = []
        excesses = [0]
        for level in _REPLAYED_LEVELS:
            uniform = replace(plan, levels=dict.fromkeys(plan.levels, level))
            states.append(self._state_bytes(uniform))
            excesses.append(max(excesses[-1], self._excess(uniform, level)))
            if states[-1] >= most:
                break
        return states, [excess + self._workspace for excess in excesses[1:]]

    def _excess(self, uniform: FoldPlan, level: int) -> int:
        key = (uniform.memory_options, level)
        if key not in self._excesses:
            peaks = self._replay_plan(uniform)
            self._excesses[key] = peaks.reserved - peaks.requested
        return self._excesses[key]
