from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.memory.options import MAX_LEVEL, TARGET_LEVEL, OptionLadder
from foam_lightning.plan import MemoryOptions, StateDtype

START = MemoryOptions(micro_batch_size=12, state_dtype="bfloat16")
CHECKPOINTING = [(False, False), (True, True), (True, False)]


@dataclass(frozen=True)
class Memory:
    """A model of memory with the shape of the real one, in arbitrary units."""

    state: int
    gradients: int
    activations: int
    logits: int

    def of(self, memory_options: MemoryOptions, level: int) -> int:
        rows = memory_options.micro_batch_size
        layers = self.activations * rows
        if memory_options.activation_checkpointing:
            layers //= 2 if memory_options.selective_checkpointing else 8
        # A chunk has a gradient of the head beside its logits.
        loss = self.logits * (2 if memory_options.chunked_loss else rows)
        gradients = self.gradients // (10 if memory_options.gradient_release else 1)
        # Gradients are there in the forward pass only if there was one before it.
        held = gradients if memory_options.accumulate_grad_batches > 1 else 0
        state = self.state >> (level + (memory_options.state_dtype == "int8"))
        if memory_options.state_offload:
            state //= 50
        return state + max(held + layers + loss, gradients)


def divisors(batch: int) -> list[int]:
    return [size for size in range(batch, 0, -1) if batch % size == 0]


def in_order_of_price(ladder: OptionLadder) -> list[MemoryOptions]:
    """List everything that may be pulled; the outermost loop is the dearest memory option."""
    start = ladder.start
    dtypes: list[StateDtype] = [start.state_dtype]
    if ladder.on_gpu and start.state_dtype != "int8":
        dtypes.append("int8")
    asked = (start.activation_checkpointing, start.selective_checkpointing)
    found = []
    for offload, release, checkpointing, dtype in product(
        sorted({start.state_offload, start.state_offload or ladder.on_gpu}),
        sorted({start.gradient_release, start.gradient_release or ladder.can_release}),
        CHECKPOINTING[CHECKPOINTING.index(asked) :],
        dtypes,
    ):
        batch = start.batch_size
        sizes = [size for size in divisors(batch) if size <= start.micro_batch_size]
        least = ladder.selective_rows if checkpointing == (True, True) != asked else 1
        for size, chunked in product(
            [batch] if release else sizes, sorted({start.chunked_loss, True})
        ):
            if size < least or (chunked > start.chunked_loss and size < ladder.chunked_rows):
                continue
            found.append(
                MemoryOptions(
                    micro_batch_size=size,
                    accumulate_grad_batches=batch // size,
                    chunked_loss=chunked,
                    activation_checkpointing=checkpointing[0],
                    selective_checkpointing=checkpointing[1],
                    gradient_release=release,
                    state_dtype=dtype,
                    state_offload=offload,
                )
            )
    return found


def first_that_fits(
    ladder: OptionLadder, fits: Callable[[MemoryOptions, int], bool]
) -> MemoryOptions | None:
    """Try everything in order, without a shortcut."""
    everything = in_order_of_price(ladder)
    for offload, level in product([False, True], (TARGET_LEVEL, MAX_LEVEL)):
        for memory_options in everything:
            if memory_options.state_offload == offload and fits(memory_options, level):
                return memory_options
    return None


def below(memory: Memory, budget: int) -> Callable[[MemoryOptions, int], bool]:
    return lambda memory_options, level: memory.of(memory_options, level) <= budget


@st.composite
def ladders(draw: st.DrawFn) -> OptionLadder:
    releases, on_gpu = draw(st.booleans()), draw(st.booleans())
    checkpoints, selective = draw(st.sampled_from(CHECKPOINTING))
    start = MemoryOptions(
        micro_batch_size=draw(st.sampled_from([1, 2, 3, 6, 12, 64])),
        accumulate_grad_batches=1 if releases else draw(st.sampled_from([1, 1, 2, 5])),
        chunked_loss=draw(st.booleans()),
        activation_checkpointing=checkpoints,
        selective_checkpointing=selective,
        gradient_release=releases,
        state_dtype=draw(st.sampled_from(["float32", "bfloat16", "int8"])),
        state_offload=on_gpu and draw(st.booleans()),
    )
    return OptionLadder(
        start,
        on_gpu=on_gpu,
        can_release=releases or draw(st.booleans()),
        selective_rows=draw(st.sampled_from([1, 2, 7, 1000])),
        chunked_rows=draw(st.integers(1, 3)),  # fewer rows than a chunk takes
    )


sizes = st.integers(0, 1000)
memories = st.builds(Memory, state=sizes, gradients=sizes, activations=sizes, logits=sizes)
GPU = OptionLadder(START)


@given(memories, ladders(), st.integers(0, 20_000))
def test_the_search_finds_what_trying_everything_finds(
    memory: Memory, ladder: OptionLadder, budget: int
) -> None:
    fits = below(memory, budget)
    assert ladder.cheapest(fits) == first_that_fits(ladder, fits)


@given(memories, ladders(), st.integers(0, 20_000))
def test_nothing_the_start_asks_for_is_let_go(
    memory: Memory, ladder: OptionLadder, budget: int
) -> None:
    start, found = ladder.start, ladder.cheapest(below(memory, budget))
    for memory_options in [found, *ladder.leanest()] if found else ladder.leanest():
        assert memory_options.batch_size == start.batch_size
        # What is released cannot be accumulated: the batch is whole.
        whole = start.batch_size if memory_options.gradient_release else 1
        assert whole <= memory_options.micro_batch_size <= max(start.micro_batch_size, whole)
        assert memory_options.gradient_release >= start.gradient_release
        assert memory_options.chunked_loss >= start.chunked_loss
        assert memory_options.activation_checkpointing >= start.activation_checkpointing
        assert memory_options.state_offload >= start.state_offload
        assert memory_options.state_dtype in (start.state_dtype, "int8")


@given(memories, ladders())
def test_the_leanest_are_the_least_of_all(memory: Memory, ladder: OptionLadder) -> None:
    least = min(
        memory.of(memory_options, MAX_LEVEL) for memory_options in in_order_of_price(ladder)
    )
    assert least == min(memory.of(memory_options, MAX_LEVEL) for memory_options in ladder.leanest())
    assert ladder.cheapest(below(memory, least)) is not None
    assert ladder.cheapest(below(memory, least - 1)) is None


@given(memories, ladders(), st.data())
def test_the_next_rung_is_the_cheapest_of_the_dearer_that_need_less(
    memory: Memory, ladder: OptionLadder, data: st.DataObject
) -> None:
    everything = in_order_of_price(ladder)
    now = data.draw(st.sampled_from(everything))

    def peak(memory_options: MemoryOptions) -> int:
        return memory.of(memory_options, TARGET_LEVEL)

    wanted = [
        memory_options
        for memory_options in everything[everything.index(now) + 1 :]
        if memory_options.state_dtype == now.state_dtype and peak(memory_options) < peak(now)
    ]
    assert ladder.next_rung(now, peak) == next(iter(wanted), None)


def test_levers_are_pulled_in_the_order_of_their_price() -> None:
    memory = Memory(state=800, gradients=0, activations=16, logits=100)
    halved = replace(START, micro_batch_size=6, accumulate_grad_batches=2, chunked_loss=True)
    split = replace(START, micro_batch_size=1, accumulate_grad_batches=12)
    selective = replace(split, activation_checkpointing=True, selective_checkpointing=True)
    for budget, memory_options in {
        1592: START,
        1591: replace(START, chunked_loss=True),
        591: halved,
        316: split,
        315: replace(split, state_dtype="int8"),
        215: replace(selective, state_dtype="int8"),
    }.items():
        assert GPU.cheapest(below(memory, budget)) == memory_options


def test_what_a_dearer_lever_makes_needless_is_let_go() -> None:
    # Only checkpointing helps here, and then neither chunks nor int8 nor smaller micro-batches do.
    memory = Memory(state=4, gradients=0, activations=16, logits=0)
    for budget, selective in ((97, True), (25, False)):
        found = OptionLadder(replace(START, micro_batch_size=1)).cheapest(
            below(replace(memory, activations=16 * 12), budget)
        )
        assert found == replace(
            START,
            micro_batch_size=1,
            activation_checkpointing=True,
            selective_checkpointing=selective,
        )


def test_gradients_are_released_only_where_nothing_else_does_and_in_one_micro_batch() -> None:
    memory = Memory(state=0, gradients=1000, activations=8, logits=1)
    for start in (START, replace(START, micro_batch_size=3, accumulate_grad_batches=4)):
        assert OptionLadder(start).cheapest(below(memory, 999)) == MemoryOptions(
            micro_batch_size=12, gradient_release=True, state_dtype="bfloat16"
        )
        assert OptionLadder(start, can_release=False).cheapest(below(memory, 999)) is None
    assert GPU.cheapest(below(memory, 1000)) == START


def test_a_cpu_keeps_its_state_as_it_is() -> None:
    memory = Memory(state=1000, gradients=0, activations=0, logits=0)
    assert OptionLadder(START, on_gpu=False).cheapest(below(memory, 249)) == START  # at level 8
    assert GPU.cheapest(below(memory, 249)) == replace(START, state_dtype="int8")


def test_state_leaves_the_device_only_where_no_level_fits() -> None:
    memory = Memory(state=100_000, gradients=0, activations=0, logits=0)
    at_8 = memory.of(replace(START, state_dtype="int8"), MAX_LEVEL)
    found = GPU.cheapest(below(memory, at_8))
    assert found is not None
    assert not found.state_offload
    found = GPU.cheapest(below(memory, at_8 - 1))
    assert found is not None
    assert found.state_offload


def test_what_is_released_is_never_split() -> None:
    ladder = OptionLadder(replace(START, gradient_release=True))
    tried = []

    def fits(memory_options: MemoryOptions, level: int) -> bool:
        tried.append(memory_options)
        return False

    assert ladder.cheapest(fits) is None
    assert {memory_options.micro_batch_size for memory_options in [*tried, *ladder.leanest()]} == {
        12
    }


def test_the_largest_micro_batch_that_fits_is_found_in_few_trials() -> None:
    start = MemoryOptions(micro_batch_size=4096)
    tried = []

    def fits(memory_options: MemoryOptions, level: int) -> bool:
        tried.append(memory_options)
        return memory_options.micro_batch_size <= 128 and memory_options.chunked_loss

    found = OptionLadder(start).cheapest(fits)
    assert found == MemoryOptions(
        micro_batch_size=128, accumulate_grad_batches=32, chunked_loss=True
    )
    assert len(set(tried)) <= 2 * (1 + 1 + 4)


def test_any_lever_on_the_device_is_better_than_a_high_level() -> None:
    memory = Memory(state=800, gradients=0, activations=8, logits=0)
    # At level 2 the state is 200, in int8 100: that, and all memory options, fit 101.
    found = GPU.cheapest(below(memory, 101))
    assert found is not None
    assert found.activation_checkpointing
    # One less, and level 2 is out of reach: at level 8 the first memory option does.
    assert GPU.cheapest(below(memory, 100)) == START


@pytest.mark.parametrize("start", [START, replace(START, activation_checkpointing=True)])
def test_none_means_that_nothing_fits(start: MemoryOptions) -> None:
    assert OptionLadder(start).cheapest(lambda *_: False) is None
