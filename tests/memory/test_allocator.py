import os
from itertools import accumulate, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foam_lightning.memory.allocator import (
    AllocatorPeaks,
    Events,
    ParameterUpdate,
    has_expandable_segments,
    replay,
    set_expandable_segments,
    two_steps,
)
from foam_lightning.memory.timeline import Repeat
from foam_lightning.memory.tracker import StorageTracker

KiB, MiB = 2**10, 2**20


def allocations(*sizes: int) -> Events:
    events = Events()
    for size in sizes:
        events.allocate(size)
    return events


def events_of(*steps: int) -> Events:
    """Make events of sizes to allocate, and of -1 - n to free block n."""
    events = Events()
    for step in steps:
        if step >= 0:
            events.allocate(step)
        else:
            events.free(-1 - step)
    return events


def reserved(*steps: int, expandable: bool = False) -> int:
    return replay(events_of(*steps), expandable=expandable).reserved


def test_nothing_needs_no_memory() -> None:
    assert replay(Events()) == AllocatorPeaks(0, 0, 0)
    assert replay(events_of(0, -1, 0)) == AllocatorPeaks(0, 0, 0)


@pytest.mark.parametrize(
    ("size", "allocated", "segment"),
    [
        (1, 512, 2 * MiB),
        (512, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),
        (MiB + 1, MiB + 512, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        # From 10 MiB on a segment of its own; a rest of up to 1 MiB stays with the block.
        (10 * MiB, 10 * MiB, 10 * MiB),
        (11 * MiB, 12 * MiB, 12 * MiB),
        (11 * MiB - 512, 11 * MiB - 512, 12 * MiB),
        (12 * MiB + 1, 12 * MiB + 512, 14 * MiB),
        (13 * MiB + 1, 14 * MiB, 14 * MiB),
    ],
)
def test_one_block_is_rounded_and_has_a_segment(size: int, allocated: int, segment: int) -> None:
    assert replay(allocations(size)) == AllocatorPeaks(size, allocated, segment)


def test_small_blocks_share_a_segment() -> None:
    assert reserved(MiB, MiB) == 2 * MiB
    assert reserved(MiB, MiB, 1) == 4 * MiB
    assert reserved(*[512] * 4096) == 2 * MiB
    assert reserved(*[513] * 2049) == 4 * MiB


def test_medium_blocks_share_a_segment_down_to_a_rest_of_one_mebibyte() -> None:
    assert reserved(9 * MiB, 9 * MiB, 2 * MiB) == 20 * MiB
    assert reserved(9 * MiB, 9 * MiB, 2 * MiB, 2 * MiB) == 40 * MiB
    # 1 MiB is left of the segment, which nothing of the large pool could use.
    assert replay(allocations(10 * MiB - 512, 9 * MiB + 512)).allocated == 20 * MiB


def test_pools_do_not_mix() -> None:
    assert reserved(20 * MiB, -1, 512) == 22 * MiB
    assert reserved(512, -1, 2 * MiB) == 22 * MiB


def test_the_best_fit_is_split() -> None:
    # Free: 40 and 30 MiB. 24 goes into the 30, whose rest of 6 then serves 5; 40 is still whole.
    assert reserved(40 * MiB, 30 * MiB, -1, -2, 24 * MiB, 5 * MiB, 40 * MiB) == 70 * MiB
    # What is free in 30 and in 40 is 46 together, and no block of 41 among them.
    assert reserved(40 * MiB, 30 * MiB, -1, -2, 24 * MiB, 42 * MiB) == 112 * MiB


def test_free_neighbours_are_merged_in_any_order() -> None:
    three = (6 * MiB, 6 * MiB, 8 * MiB)
    for order in permutations((-1, -2, -3)):
        assert reserved(*three, *order, 20 * MiB) == 20 * MiB
    # With the middle one alive they do not.
    assert reserved(*three, -1, -3, 14 * MiB) == 34 * MiB


def test_segments_are_not_merged() -> None:
    assert reserved(10 * MiB, 10 * MiB, -1, -2, 20 * MiB) == 40 * MiB


def test_an_expandable_segment_grows_at_its_end() -> None:
    assert reserved(10 * MiB, 10 * MiB, -1, -2, 20 * MiB, expandable=True) == 20 * MiB
    assert reserved(11 * MiB, expandable=True) == 20 * MiB
    # The free end of 9 MiB is used before pages are added.
    assert reserved(11 * MiB, 29 * MiB, expandable=True) == 40 * MiB
    assert reserved(11 * MiB, 29 * MiB + 1, expandable=True) == 60 * MiB
    assert reserved(MiB, MiB, 1, expandable=True) == 4 * MiB
    # A hole in the middle serves what fits it, and only that.
    hole = (20 * MiB, 20 * MiB, 20 * MiB, -2)
    assert reserved(*hole, 12 * MiB, 8 * MiB, expandable=True) == 60 * MiB
    assert reserved(*hole, 21 * MiB, expandable=True) == 100 * MiB
    # The free end, which may still grow, is used after every hole that is large enough.
    assert reserved(40 * MiB, 12 * MiB, -1, 6 * MiB, 34 * MiB, expandable=True) == 60 * MiB
    assert reserved(40 * MiB, 12 * MiB, -1, 6 * MiB, 40 * MiB, expandable=True) == 100 * MiB


SIZES = st.one_of(st.integers(0, 4 * KiB), st.integers(0, 3 * MiB), st.integers(0, 30 * MiB))


@st.composite
def some_events(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES) -> Events:
    events = Events()
    alive: list[int] = []
    for _ in range(draw(st.integers(0, 40))):
        if draw(st.booleans()) and alive:
            events.free(alive.pop(draw(st.integers(0, len(alive) - 1))))
        else:
            alive.append(events.allocate(draw(sizes)))
    return events


def alive_after(events: Events) -> list[int]:
    dead = {~change for change in events.changes if change < 0}
    return [number for number in range(len(events.sizes)) if number not in dead]


def repeated(events: Events, times: int) -> Events:
    """Free everything at the end, and begin anew."""
    found = Events()
    for _ in range(times):
        shift = len(found.sizes)
        found.sizes.extend(events.sizes)
        found.changes.extend(c + shift if c >= 0 else c - shift for c in events.changes)
        found.changes.extend(~(number + shift) for number in alive_after(events))
    return found


@given(some_events(), st.booleans())
def test_reserved_covers_allocated_covers_requested(events: Events, expandable: bool) -> None:
    usage = replay(events, expandable=expandable)
    deltas = [events.sizes[c] if c >= 0 else -events.sizes[~c] for c in events.changes]
    assert usage.requested == max(accumulate(deltas, initial=0))
    assert usage.requested <= usage.allocated <= usage.reserved
    assert usage.allocated % 512 == 0
    assert usage.reserved % (2 * MiB) == 0


@given(st.integers(1, 30 * MiB), st.booleans(), st.integers(2, 4), st.data())
def test_a_second_round_reserves_nothing_more(
    size: int, expandable: bool, times: int, data: st.DataObject
) -> None:
    # Blocks of one size; those of many may come to lie otherwise, and leave holes, the next time.
    events = data.draw(some_events(st.just(size)))
    once = replay(repeated(events, 1), expandable=expandable)
    assert replay(repeated(events, times), expandable=expandable) == once


# ---- the events of a training step


def test_two_steps_keep_the_state_and_free_the_rest() -> None:
    step = events_of(100, 200, -1, 300)
    events = two_steps([1000], step, [ParameterUpdate((10, 20), 5)])
    assert events.sizes == [1000, 100, 200, 300, 10, 20, 5, 100, 200, 300, 5]
    dead = [~change for change in events.changes if change < 0]
    assert dead == [1, 6, 2, 3, 7, 10, 8, 9]
    assert alive_after(events) == [0, 4, 5]


def test_updates_inside_backward_come_at_their_marks() -> None:
    step = Events([7, 8], [0, ~0, 1, ~1], [(1, "update 1"), (2, "other"), (3, "update 0")])
    updates = [ParameterUpdate((10,), 1), ParameterUpdate((20,), 2)]
    events = two_steps([], step, updates)
    assert events.sizes == [7, 20, 2, 8, 10, 1, 7, 2, 8, 1]


def test_updates_of_alike_layers_are_counted_from_both_ends() -> None:
    # Three layers of one parameter between two others were traced; there are five.
    order = [4, 3, 2, 2, 2, 1, 0]
    step = Events([], [], [(0, f"update {index}") for index in order])
    updates = [ParameterUpdate((), size) for size in (1, 9, 9, 9, 9, 9, 5)]
    assert two_steps([], step, updates).sizes == [5, 9, 9, 9, 9, 9, 1] * 2


def storages(count: int, size: int = 1) -> list[Tensor]:
    return [torch.empty(size, dtype=torch.uint8) for _ in range(count)]


def totals(events: Events) -> list[int]:
    deltas = [events.sizes[c] if c >= 0 else -events.sizes[~c] for c in events.changes]
    return list(accumulate(deltas))


def test_events_of_a_repeat_happen_once_for_each_time() -> None:
    tracker = StorageTracker()
    with tracker:
        kept = [torch.empty(3, dtype=torch.uint8)]
        tracker.mark("a")
        passing = torch.empty(50, dtype=torch.uint8)
        kept.append(torch.empty(3, dtype=torch.uint8))
        del passing
        tracker.mark("look")
        tracker.mark("b")
        kept.append(torch.empty(3, dtype=torch.uint8))
        kept.pop()
        tracker.mark("c")
        kept.pop()
        tracker.mark("d")
        kept.clear()
    repeats = [Repeat("a", "b", 3), Repeat("c", "d", 3)]
    events = tracker.timeline(repeats).events()
    assert totals(events) == [3, 53, 56, 6, 56, 59, 9, 59, 62, 12, 15, 12, 9, 6, 3, 0]
    assert sorted(events.changes)[: len(events.sizes)] == [~n for n in range(8)][::-1]
    assert [at for at, name in events.marks if name == "look"] == [4, 7, 10]


def test_weights_and_state_are_not_among_the_events() -> None:
    tracker = StorageTracker()
    with tracker:
        weight, state, rest = storages(3)
        tracker.claim([weight], "weights")
        tracker.claim([state], "optimizer_state")
        assert totals(tracker.timeline().events()) == [1]
    del rest


# ---- the setting

GENERAL, CUDA = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
ON, OFF = "expandable_segments:True", "expandable_segments:False"


@pytest.mark.parametrize(
    ("variables", "is_on"),
    [
        ({}, True),
        ({GENERAL: ON}, True),
        ({GENERAL: OFF}, False),
        ({CUDA: OFF}, False),
        ({GENERAL: "max_split_size_mb:512"}, False),
        ({CUDA: " max_split_size_mb:512, expandable_segments : True "}, True),
        ({CUDA: f"{ON},{OFF}"}, False),
        ({CUDA: "", GENERAL: ON}, False),  # torch reads the first that is set
        ({CUDA: ON, GENERAL: OFF}, True),
        ({"PYTORCH_HIP_ALLOC_CONF": OFF, GENERAL: ON}, False),
    ],
    ids=str,
)
def test_segments_expand_unless_the_user_set_up_the_allocator(
    variables: dict[str, str], is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/", **variables})
    set_expandable_segments()
    assert has_expandable_segments() == is_on
    added = {} if variables else {GENERAL: ON}
    assert os.environ == {"HOME": "/", **variables, **added}


def test_where_torch_has_no_expandable_segments_nothing_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("sys.platform", "win32")
    set_expandable_segments()
    assert os.environ == {}
    assert not has_expandable_segments()
