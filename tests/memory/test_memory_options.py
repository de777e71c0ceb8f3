from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.memory.options import (
    MAX_LEVEL,
    TARGET_LEVEL,
    OptionLadder,
    min_rows_for_selective_checkpointing,
    option_costs,
)
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

    def peak(self, options: MemoryOptions, level: int) -> int:
        rows = options.micro_batch_size
        layers = self.activations * rows
        if options.activation_checkpointing:
            layers //= 2 if options.selective_checkpointing else 8
        # A chunk has a gradient of the head next to its logits.
        loss = self.logits * (2 if options.chunked_loss else rows)
        gradients = self.gradients // (10 if options.gradient_release else 1)
        # Gradients are alive in the forward pass only if there was a backward pass before it.
        accumulates = options.accumulate_grad_batches > 1 and not options.gradient_release
        held = gradients if accumulates else 0
        if options.grad_offload:  # the sum beside the gradient
            gradients *= 2
        state = self.state >> (level + (options.state_dtype == "int8"))
        if options.state_offload:
            state //= 50
        return state + max(held + layers + loss, gradients)

    def fits(self, budget: int) -> Callable[[MemoryOptions, int], bool]:
        return lambda options, level: self.peak(options, level) <= budget


def from_fastest_to_slowest(ladder: OptionLadder) -> list[MemoryOptions]:
    """List every allowed set; the outermost loop is the slowest option."""
    start, batch = ladder.start, ladder.start.batch_size
    dtypes: list[StateDtype] = [start.state_dtype]
    if ladder.on_gpu and start.state_dtype != "int8":
        dtypes.append("int8")
    asked = (start.activation_checkpointing, start.selective_checkpointing)
    sizes = [n for n in range(start.micro_batch_size, 0, -1) if batch % n == 0]
    found = []
    can_sum = ladder.on_gpu and ladder.can_release and (ladder.clips_all or batch > 1)
    # Released gradients that are clipped together are summed, except where there is no GPU.
    can_only_sum = ladder.clips_all and ladder.on_gpu
    for sums, offload, release, checkpointing, dtype in product(
        sorted({start.grad_offload, start.grad_offload or can_sum}),
        sorted({start.state_offload, start.state_offload or ladder.on_gpu}),
        sorted({start.gradient_release, start.gradient_release or ladder.can_release}),
        CHECKPOINTING[CHECKPOINTING.index(asked) :],
        dtypes,
    ):
        if sums and not release:
            continue
        if release and not sums and can_only_sum and not start.gradient_release:
            continue
        min_rows = ladder.min_selective_rows if checkpointing == (True, True) != asked else 1
        for size, chunked in product(
            [batch] if release and not sums else sizes, sorted({start.chunked_loss, True})
        ):
            needless_chunks = chunked > start.chunked_loss and size < ladder.min_chunked_rows
            if size < min_rows or needless_chunks:
                continue
            found.append(
                MemoryOptions(
                    micro_batch_size=size,
                    accumulate_grad_batches=batch // size,
                    chunked_loss=chunked,
                    activation_checkpointing=checkpointing[0],
                    selective_checkpointing=checkpointing[1],
                    gradient_release=release,
                    grad_offload=sums,
                    state_dtype=dtype,
                    state_offload=offload,
                )
            )

    # All gradients cross the bus in each micro-batch, so that fewer of them come first.
    def transfers(options: MemoryOptions) -> tuple[bool, bool, int]:
        num_sums = options.accumulate_grad_batches if options.grad_offload else 0
        return options.grad_offload, options.state_offload, num_sums

    return sorted(found, key=transfers)


def try_everything(
    ladder: OptionLadder, fits: Callable[[MemoryOptions, int], bool]
) -> MemoryOptions | None:
    every = from_fastest_to_slowest(ladder)
    offloaded = product([False, True], [False, True])
    for (sums, state), level in product(offloaded, (TARGET_LEVEL, MAX_LEVEL)):
        for options in every:
            asked = options.grad_offload, options.state_offload
            if asked == (sums, state) and fits(options, level):
                return options
    return None


@st.composite
def ladders(draw: st.DrawFn) -> OptionLadder:
    releases, on_gpu = draw(st.booleans()), draw(st.booleans())
    sums = releases and on_gpu and draw(st.booleans())
    checkpoints, selective = draw(st.sampled_from(CHECKPOINTING))
    is_whole = releases and not sums
    start = MemoryOptions(
        micro_batch_size=draw(st.sampled_from([1, 2, 3, 6, 12, 64])),
        accumulate_grad_batches=1 if is_whole else draw(st.sampled_from([1, 1, 2, 5])),
        chunked_loss=draw(st.booleans()),
        activation_checkpointing=checkpoints,
        selective_checkpointing=selective,
        gradient_release=releases,
        grad_offload=sums,
        state_dtype=draw(st.sampled_from(["float32", "bfloat16", "int8"])),
        state_offload=on_gpu and draw(st.booleans()),
    )
    return OptionLadder(
        start,
        on_gpu=on_gpu,
        can_release=releases or draw(st.booleans()),
        clips_all=draw(st.booleans()),
        min_selective_rows=draw(st.sampled_from([1, 2, 7, 1000])),
        min_chunked_rows=draw(st.integers(1, 3)),
    )


sizes = st.integers(0, 1000)
memories = st.builds(Memory, state=sizes, gradients=sizes, activations=sizes, logits=sizes)
GPU = OptionLadder(START)


@given(memories, ladders(), st.integers(0, 20_000))
def test_the_search_finds_what_trying_everything_finds(
    memory: Memory, ladder: OptionLadder, budget: int
) -> None:
    fits = memory.fits(budget)
    assert ladder.find_fastest(fits) == try_everything(ladder, fits)


@given(memories, ladders())
def test_one_candidate_needs_least_of_all(memory: Memory, ladder: OptionLadder) -> None:
    smallest = min(memory.peak(each, MAX_LEVEL) for each in from_fastest_to_slowest(ladder))
    candidates = ladder.candidates_for_minimum()
    assert smallest == min(memory.peak(each, MAX_LEVEL) for each in candidates)
    assert ladder.find_fastest(memory.fits(smallest)) is not None
    assert ladder.find_fastest(memory.fits(smallest - 1)) is None


@given(memories, ladders(), st.data())
def test_after_running_out_of_memory_the_next_slower_option_that_saves_some_follows(
    memory: Memory, ladder: OptionLadder, data: st.DataObject
) -> None:
    every = from_fastest_to_slowest(ladder)
    now = data.draw(st.sampled_from(every))
    refused = data.draw(st.sampled_from([*every, None]).filter(lambda one: one != now))

    def peak(options: MemoryOptions) -> int | None:
        return None if options == refused else memory.peak(options, TARGET_LEVEL)

    smaller = [
        each
        for each in every[every.index(now) + 1 :]
        if each.state_dtype == now.state_dtype
        and each != refused
        and memory.peak(each, TARGET_LEVEL) < memory.peak(now, TARGET_LEVEL)
    ]
    assert ladder.find_smaller(now, peak) == next(iter(smaller), None)


def test_faster_options_are_turned_on_first() -> None:
    memory = Memory(state=800, gradients=0, activations=16, logits=100)
    halved = replace(START, micro_batch_size=6, accumulate_grad_batches=2, chunked_loss=True)
    split = replace(START, micro_batch_size=1, accumulate_grad_batches=12)
    selective = replace(split, activation_checkpointing=True, selective_checkpointing=True)
    for budget, options in {
        1592: START,
        1591: replace(START, chunked_loss=True),
        591: halved,
        316: split,
        315: replace(split, state_dtype="int8"),
        215: replace(selective, state_dtype="int8"),
    }.items():
        assert GPU.find_fastest(memory.fits(budget)) == options


def test_gradients_are_summed_in_few_large_micro_batches_where_nothing_else_fits() -> None:
    memory = Memory(state=0, gradients=300, activations=160, logits=0)
    released = replace(START, activation_checkpointing=True, gradient_release=True)
    # Checkpointed rows take 20 each.
    assert GPU.find_fastest(memory.fits(240)) == released
    assert GPU.find_fastest(memory.fits(120)) == replace(
        released, micro_batch_size=6, accumulate_grad_batches=2, grad_offload=True
    )
    on_cpu = OptionLadder(START, on_gpu=False)
    assert on_cpu.find_fastest(memory.fits(120)) is None


def test_released_gradients_that_are_clipped_together_are_summed() -> None:
    memory = Memory(state=0, gradients=1000, activations=1, logits=0)
    summed = replace(START, gradient_release=True, grad_offload=True)
    assert OptionLadder(START, clips_all=True).find_fastest(memory.fits(200)) == summed


def test_the_largest_micro_batch_that_fits_is_found_in_few_trials() -> None:
    tried = []

    def fits(options: MemoryOptions, level: int) -> bool:
        tried.append(options)
        return options.micro_batch_size <= 128 and options.chunked_loss

    assert OptionLadder(MemoryOptions(micro_batch_size=4096)).find_fastest(fits) == MemoryOptions(
        micro_batch_size=128, accumulate_grad_batches=32, chunked_loss=True
    )
    assert len(set(tried)) <= 2 * (1 + 1 + 4)


# ---- what options cost

SHAPES = {
    "model.embed_tokens.weight": (500, 10),
    "model.layers.0.self_attn.q_proj.weight": (100, 150),
    "model.layers.0.input_layernorm.weight": (10_000,),
    "model.layers.1.mlp.down_proj.weight": (100, 300),
    "lm_head.weight": (500, 10),
}
TIED = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}


def costs_of(shapes: dict[str, tuple[int, ...]] = SHAPES, **options: Any) -> dict[str, str]:
    memory_options = MemoryOptions(**{"micro_batch_size": 4, **options})
    return option_costs(memory_options, shapes, 7_500_000_000, 13_000_000_000)


@pytest.mark.parametrize("shapes", [SHAPES, TIED], ids=["untied", "tied"])
def test_work_is_a_share_of_the_matrix_products_of_a_step(
    shapes: dict[str, tuple[int, ...]],
) -> None:
    # 45000 weights multiply in the decoder, 5000 in the head; forward once, backward twice.
    found = costs_of(shapes, activation_checkpointing=True)
    assert found["activation_checkpointing"].startswith("30% more")


def test_state_in_host_memory_crosses_the_bus_twice() -> None:
    assert "15 GB" in costs_of(state_offload=True)["state_offload"]


def test_gradients_cross_the_bus_twice_in_each_micro_batch() -> None:
    found = costs_of(gradient_release=True, grad_offload=True, accumulate_grad_batches=10)
    assert "260 GB" in found["grad_offload"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_loss": True, "state_dtype": "int8", "state_offload": True},
        {"activation_checkpointing": True, "accumulate_grad_batches": 2},
        {"gradient_release": True},
        {"gradient_release": True, "grad_offload": True},
    ],
    ids=lambda options: " ".join(options) or "none",
)
def test_every_option_that_is_on_has_a_cost(options: dict[str, Any]) -> None:
    assert set(costs_of(**options)) == set(options)


def test_selective_checkpointing_computes_no_product_again() -> None:
    found = costs_of(activation_checkpointing=True, selective_checkpointing=True)
    assert list(found) == ["selective_checkpointing"]


@pytest.mark.parametrize(
    ("length", "on_gpu", "rows"),
    # A row of 10 tokens takes 2 * 10 * 22500 multiplications in each of the two layers; 5 ms of
    # selecting are 5e8 of them on a CPU, and 1000 times as many on a GPU.
    [(10, False, 1112), (10, True, 1_111_112), (10**9, True, 1)],
)
def test_selective_checkpointing_is_faster_from_some_rows_on(
    length: int, on_gpu: bool, rows: int
) -> None:
    assert min_rows_for_selective_checkpointing(SHAPES, length, on_gpu=on_gpu) == rows
