"""The levers that make a run fit, tried from the cheapest in speed to the dearest."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from foam_lightning.plan import Levers

# A rung is worth taking when folding at this level fits on it; only where no rung allows that do
# higher levels come in. 2 is the level of the paper's main results.
TARGET_LEVEL = 2
# Levels above 8 save next to nothing: two moments of a matrix are 1/256 of Adam's here.
MAX_LEVEL = 8

Fits = Callable[[Levers, int], bool]


def cheapest(start: Levers, fits: Fits) -> Levers | None:
    """Find the cheapest levers that fit.

    The order of price: nothing, chunked loss, smaller micro-batches with more accumulation,
    activation checkpointing (with the largest micro-batch that then fits), gradient release (with
    the whole batch in one micro-batch, since there is nothing to accumulate).

    Args:
        start: The levers that the configuration asks for; none of them is ever let go.
        fits: Says whether a run with these levers fits at one uniform level.

    Returns:
        The first that fits at level 2, else the first that fits at level 8, else None.
    """
    for level in (TARGET_LEVEL, MAX_LEVEL):
        for stage in _stages(start):
            found = _largest(stage, lambda levers, level=level: fits(levers, level))  # type: ignore[misc]
            if found is not None:
                return found
    return None


def leanest(start: Levers) -> list[Levers]:
    """List the levers of which one needs the least memory, the cheapest first.

    Which one depends on the model: a lever that saves activations may cost gradients, such as
    accumulation, which holds them during the forward passes, or gradient release, which cannot
    split the batch.
    """
    ends = (levers for stage in _stages(start) for levers in (stage[0], stage[-1]))
    return list(dict.fromkeys(ends))


def _stages(start: Levers) -> Iterator[list[Levers]]:
    """Yield lists of levers of one price class, memory falling from the second of each on."""
    yield [start]
    chunked = replace(start, chunked_loss=True)
    yield _micro_batches(chunked)
    checkpointing = replace(chunked, activation_checkpointing=True)
    yield _micro_batches(checkpointing)
    yield [
        replace(
            checkpointing,
            micro_batch_size=start.batch_size,
            accumulate_grad_batches=1,
            gradient_release=True,
        )
    ]


def _micro_batches(levers: Levers) -> list[Levers]:
    if levers.gradient_release:
        return [levers]
    batch = levers.batch_size
    sizes = (size for size in range(levers.micro_batch_size, 0, -1) if batch % size == 0)
    return [
        replace(levers, micro_batch_size=size, accumulate_grad_batches=batch // size)
        for size in sizes
    ]


def _largest(stage: list[Levers], fits: Callable[[Levers], bool]) -> Levers | None:
    """Find the first element that fits; from the second on, by bisection."""
    first, *rest = stage
    if fits(first):
        return first
    # The first may not accumulate. The second does, so it may need more: gradients are alive in
    # its forward passes.
    if not rest or not fits(rest[-1]):
        return None
    low, high = 0, len(rest) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(rest[middle]):
            high = middle
        else:
            low = middle + 1
    return rest[low]
