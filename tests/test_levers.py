from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.memory.levers import MAX_LEVEL, TARGET_LEVEL, cheapest, leanest
from foam_lightning.plan import Levers

START = Levers(micro_batch_size=12, state_dtype="bfloat16")


@dataclass(frozen=True)
class Memory:
    """A model of memory with the shape of the real one, in arbitrary units."""

    state: int
    gradients: int
    activations: int
    logits: int

    def of(self, levers: Levers, level: int) -> int:
        rows = levers.micro_batch_size
        layers = self.activations * rows // (8 if levers.activation_checkpointing else 1)
        loss = self.logits * (min(rows, 1) if levers.chunked_loss else rows)
        gradients = self.gradients // (10 if levers.gradient_release else 1)
        # Gradients are there in the forward pass only if there was one before it.
        held = gradients if levers.accumulate_grad_batches > 1 else 0
        return self.state // 2**level + max(held + layers + loss, gradients)


def divisors(batch: int) -> list[int]:
    return [size for size in range(batch, 0, -1) if batch % size == 0]


def in_order_of_price(start: Levers) -> list[Levers]:
    def split(levers: Levers, size: int) -> Levers:
        return replace(
            levers,
            micro_batch_size=size,
            accumulate_grad_batches=start.batch_size // size,
        )

    sizes = [size for size in divisors(start.batch_size) if size <= start.micro_batch_size]
    if start.gradient_release:
        sizes = [start.batch_size]
    chunked = replace(start, chunked_loss=True)
    saving = replace(chunked, activation_checkpointing=True)
    return [
        start,
        *(split(chunked, s) for s in sizes),
        *(split(saving, s) for s in sizes),
        replace(split(saving, start.batch_size), gradient_release=True),
    ]


def first_that_fits(start: Levers, fits: Callable[[Levers, int], bool]) -> Levers | None:
    """Try everything in order, without a shortcut."""
    for level in (TARGET_LEVEL, MAX_LEVEL):
        for levers in in_order_of_price(start):
            if fits(levers, level):
                return levers
    return None


def below(memory: Memory, budget: int) -> Callable[[Levers, int], bool]:
    return lambda levers, level: memory.of(levers, level) <= budget


sizes = st.integers(0, 1000)
starts = st.builds(
    Levers,
    micro_batch_size=st.sampled_from([1, 2, 3, 6, 12, 64]),
    accumulate_grad_batches=st.sampled_from([1, 1, 2, 5]),
    chunked_loss=st.booleans(),
    activation_checkpointing=st.booleans(),
    state_dtype=st.sampled_from(["float32", "bfloat16"]),
) | st.builds(
    Levers,
    micro_batch_size=st.sampled_from([1, 2, 12]),
    chunked_loss=st.booleans(),
    activation_checkpointing=st.booleans(),
    gradient_release=st.just(True),
)
memories = st.builds(Memory, state=sizes, gradients=sizes, activations=sizes, logits=sizes)


@given(memories, starts, st.integers(0, 20_000))
def test_the_search_finds_what_trying_everything_finds(
    memory: Memory, start: Levers, budget: int
) -> None:
    fits = below(memory, budget)
    assert cheapest(start, fits) == first_that_fits(start, fits)


@given(memories, starts, st.integers(0, 20_000))
def test_nothing_the_start_asks_for_is_let_go(memory: Memory, start: Levers, budget: int) -> None:
    found = cheapest(start, below(memory, budget))
    for levers in [found, *leanest(start)] if found else leanest(start):
        assert levers.batch_size == start.batch_size
        # What is released cannot be accumulated: the batch is whole.
        whole = start.batch_size if levers.gradient_release else 1
        assert whole <= levers.micro_batch_size <= max(start.micro_batch_size, whole)
        assert levers.gradient_release >= start.gradient_release
        assert levers.chunked_loss >= start.chunked_loss
        assert levers.activation_checkpointing >= start.activation_checkpointing
        assert levers.state_dtype == start.state_dtype


@given(memories, starts)
def test_the_leanest_are_the_least_of_all(memory: Memory, start: Levers) -> None:
    least = min(memory.of(levers, MAX_LEVEL) for levers in in_order_of_price(start))
    assert least == min(memory.of(levers, MAX_LEVEL) for levers in leanest(start))
    assert cheapest(start, below(memory, least)) is not None
    assert cheapest(start, below(memory, least - 1)) is None


def test_levers_are_pulled_in_the_order_of_their_price() -> None:
    memory = Memory(state=0, gradients=0, activations=10, logits=100)
    found = [cheapest(START, below(memory, budget)) for budget in (1320, 1319, 219, 159, 110, 109)]
    assert [
        levers and (levers.micro_batch_size, levers.chunked_loss, levers.activation_checkpointing)
        for levers in found
    ] == [
        (12, False, False),
        (12, True, False),
        (6, True, False),
        (4, True, False),
        (1, True, False),
        (6, True, True),
    ]


def test_gradients_are_released_last_and_in_one_micro_batch() -> None:
    memory = Memory(state=0, gradients=1000, activations=8, logits=1)
    held, released = (
        memory.of(levers, TARGET_LEVEL) for levers in (START, in_order_of_price(START)[-1])
    )
    assert (held, released) == (1000, 100)
    for start in (START, replace(START, micro_batch_size=3, accumulate_grad_batches=4)):
        found = cheapest(start, below(memory, 999))
        assert found == Levers(
            micro_batch_size=12,
            chunked_loss=True,
            activation_checkpointing=True,
            gradient_release=True,
            state_dtype="bfloat16",
        )
        assert cheapest(start, below(memory, 100)) == found
        assert cheapest(start, below(memory, 99)) is None
    assert cheapest(START, below(memory, 1000)) == START


def test_what_is_released_is_never_split() -> None:
    start = replace(START, gradient_release=True)
    tried = []

    def fits(levers: Levers, level: int) -> bool:
        tried.append(levers)
        return False

    assert cheapest(start, fits) is None
    assert {levers.micro_batch_size for levers in [*tried, *leanest(start)]} == {12}


def test_the_largest_micro_batch_that_fits_is_found_in_few_trials() -> None:
    start = Levers(micro_batch_size=4096)
    tried = []

    def fits(levers: Levers, level: int) -> bool:
        tried.append(levers)
        return levers.micro_batch_size <= 128

    found = cheapest(start, fits)
    assert found == Levers(micro_batch_size=128, accumulate_grad_batches=32, chunked_loss=True)
    assert len(tried) <= 1 + 2 + 4


def test_any_lever_is_better_than_a_high_level() -> None:
    memory = Memory(state=800, gradients=0, activations=8, logits=0)
    # At level 2 the state is 200: that, and all levers, fit 201.
    found = cheapest(START, below(memory, 201))
    assert found is not None
    assert found.activation_checkpointing
    # One less, and level 2 is out of reach: at level 8 the first lever does.
    assert cheapest(START, below(memory, 200)) == START


@pytest.mark.parametrize("start", [START, replace(START, activation_checkpointing=True)])
def test_none_means_that_nothing_fits(start: Levers) -> None:
    assert cheapest(start, lambda *_: False) is None
