"""Combinations of training settings in which every pair of settings occurs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import get_args

from foam_lightning.memory.trace import Precision
from foam_lightning.plan import MemoryOptions, StateDtype

LEVELS = {"FOAM 0": 0, "FOAM 2": 2, "FOAM mixed": None}
FOREACH = {"AdamW foreach": True, "AdamW loop": False}
# Whether layers are checkpointed, and whether selectively.
CHECKPOINTING = {"none": (False, False), "selective": (True, True), "whole": (True, False)}
_ACCUMULATION = (1, 2, 4)


@dataclass(frozen=True)
class Combination:
    """How one run trains.

    Attributes:
        model: A file of configs/, without its ending.
        precision: Lightning's name of the precision.
        optimizer: A key of `LEVELS` or of `FOREACH`.
        memory_options: The rest. AdamW ignores their `state_dtype`: its moments have the dtype of
            the weights.
    """

    model: str
    precision: Precision
    optimizer: str
    memory_options: MemoryOptions

    @property
    def is_foam(self) -> bool:
        return self.optimizer in LEVELS

    @property
    def checkpointing(self) -> str:
        """A key of `CHECKPOINTING`."""
        memory_options = self.memory_options
        found = (memory_options.activation_checkpointing, memory_options.selective_checkpointing)
        return next(name for name, switches in CHECKPOINTING.items() if switches == found)

    @property
    def state(self) -> str:
        """The dtype of the moments, and where they are if not on the device."""
        if not self.is_foam:
            return "of the weights"
        where = ", in host memory" if self.memory_options.state_offload else ""
        return self.memory_options.state_dtype + where

    @property
    def settings(self) -> tuple[object, ...]:
        """The settings that pairs are made of."""
        memory_options = self.memory_options
        return (
            self.model,
            self.precision,
            self.optimizer,
            self.state,
            memory_options.micro_batch_size,
            memory_options.accumulate_grad_batches,
            self.checkpointing,
            memory_options.chunked_loss,
            memory_options.gradient_release,
        )


Pair = tuple[tuple[int, object], tuple[int, object]]


def pairs(combination: Combination) -> list[Pair]:
    return list(combinations(enumerate(combination.settings), 2))


def every(
    models: Sequence[str], micro_batches: Sequence[int], *, with_offload: bool
) -> Iterator[Combination]:
    """Yield every valid combination: AdamW releases no gradients and has one state dtype.

    Args:
        models: Files of configs/, without their ending.
        micro_batches: Rows of a forward pass.
        with_offload: Whether state may be in host memory, in bfloat16.
    """
    states = [(dtype, False) for dtype in get_args(StateDtype)]
    states += [("bfloat16", True)] * with_offload
    batches = [(times, False) for times in _ACCUMULATION] + [(1, True)]
    for model, precision, micro_batch, (times, releases), checkpointing, chunks in product(
        models, get_args(Precision), micro_batches, batches, CHECKPOINTING.values(), (False, True)
    ):
        for optimizer, (state_dtype, offloads) in product((*LEVELS, *FOREACH), states):
            if optimizer in FOREACH and (releases or state_dtype != "float32"):
                continue
            memory_options = MemoryOptions(
                micro_batch_size=micro_batch,
                accumulate_grad_batches=times,
                activation_checkpointing=checkpointing[0],
                selective_checkpointing=checkpointing[1],
                chunked_loss=chunks,
                gradient_release=releases,
                state_dtype=state_dtype,
                state_offload=offloads,
            )
            yield Combination(model, precision, optimizer, memory_options)


def choose(
    models: Sequence[str], micro_batches: Sequence[int], count: int, *, with_offload: bool
) -> list[Combination]:
    """Choose combinations one by one, each with the most pairs that are rare so far.

    Args:
        models: Files of configs/, without their ending.
        micro_batches: Rows of a forward pass.
        count: How many.
        with_offload: See `every`.
    """
    combinations_of = every(models, micro_batches, with_offload=with_offload)
    left = {combination: pairs(combination) for combination in combinations_of}
    weights = {pair: 1.0 for of_one in left.values() for pair in of_one}
    chosen = []
    for _ in range(count):
        best = max(left, key=lambda one: sum(map(weights.__getitem__, left[one])))
        for pair in left.pop(best):
            weights[pair] /= 10
        chosen.append(best)
    return chosen
