"""What every pulled memory option costs, by a model of the step's work."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from foam_lightning.model.roles import layer_of
from foam_lightning.plan import MemoryOptions, StateDtype
from foam_lightning.units import format_bytes

# A rung is worth taking when folding at this level fits on it; only where no rung allows that do
# higher levels come in. 2 is the level of the paper's main results.
TARGET_LEVEL = 2
# Levels above 8 save next to nothing: two moments of a matrix are 1/256 of Adam's here.
MAX_LEVEL = 8

Fits = Callable[[MemoryOptions, int], bool]
# Activation and selective checkpointing, from the cheapest to the dearest.
_CHECKPOINTING = ((False, False), (True, True), (True, False))


@dataclass(frozen=True)
class OptionLadder:
    """Every set of memory options that a job may train with, in order of price.

    Sets are ordered by their dearest memory option, then by the next, from dear to cheap: state in
    host memory (it crosses the bus twice a step), gradient release (the whole batch is one
    micro-batch), whole activation checkpointing (the forward pass once more), selective
    checkpointing (all of it but the products), state in int8, more and smaller micro-batches,
    chunked loss (the head's product once more). So a memory option is pulled only where all that is
    cheaper does not do, and nothing is pulled in vain.

    Args:
        start: The memory options that the configuration asks for; none of them is ever let go.
        on_gpu: Whether state may go to int8 and to host memory: a CPU has no compiled update of
            int8 state, which takes 30 times as long there, and no other memory.
        can_release: Whether gradients may be released, which one device alone can do.
        selective_rows: Rows from which a micro-batch takes longer to run forward again than torch
            takes to choose what to keep: with fewer, selective checkpointing is the dearer one.
        chunked_rows: Rows from which the loss of a micro-batch is more than one chunk; with fewer
            it is taken in one piece.
    """

    start: MemoryOptions
    on_gpu: bool = True
    can_release: bool = True
    selective_rows: int = 1
    chunked_rows: int = 1

    def cheapest(self, fits: Fits) -> MemoryOptions | None:
        """Find the cheapest memory options that fit.

        State goes to host memory only where no level fits on the device: on the models measured so
        far, levels 1 to 8 differ by less than it costs.

        Args:
            fits: Says whether a run with these memory options fits at one uniform level.

        Returns:
            The cheapest that fit at level 2, else at level 8, else None.
        """
        for offload in self._choices("state_offload"):
            for level in (TARGET_LEVEL, MAX_LEVEL):
                for base in self._bases(offload):
                    found = self._best(base, partial(_fits_at, fits, level))
                    if found is not None:
                        return found
        return None

    def leanest(self) -> list[MemoryOptions]:
        """List the memory options of which one needs the least memory, the cheapest first.

        Which one depends on the model: a memory option that saves activations may cost gradients,
        such as accumulation, which holds them during the forward passes, or gradient release, which
        cannot split the batch.
        """
        bases = self._bases(self._choices("state_offload")[-1])
        # Each replaces a cheaper one, so that the dearest is left, with and without release.
        dearest = {base.gradient_release: base for base in bases}.values()
        stages = [self._micro_batches(base) for base in dearest]
        ends = [memory_options for stage in stages for memory_options in (stage[0], stage[-1])]
        return list(dict.fromkeys(way for end in ends for way in (self._whole(end), end)))

    def next_rung(
        self, memory_options: MemoryOptions, peak: Callable[[MemoryOptions], int]
    ) -> MemoryOptions | None:
        """Find the cheapest memory options that are dearer than these and need less memory.

        The state stays as it is kept, so that a checkpoint serves both.

        Args:
            memory_options: Those of a run that went out of memory.
            peak: Predicts the peak of the run with other memory options, in bytes.

        Returns:
            None if there are none.
        """
        now = _price(memory_options)
        before = peak(memory_options)
        rungs = (
            rung
            for offload in self._choices("state_offload")
            for base in self._bases(offload)
            for chunked in self._micro_batches(base)
            for rung in (self._whole(chunked), chunked)
            if rung.state_dtype == memory_options.state_dtype and _price(rung) > now
        )
        return next((rung for rung in rungs if peak(rung) < before), None)

    def _choices(self, option: str) -> list[bool]:
        if getattr(self.start, option):
            return [True]
        allowed = self.on_gpu if option == "state_offload" else self.can_release
        return [False, True] if allowed else [False]

    def _bases(self, offload: bool) -> Iterator[MemoryOptions]:
        """Yield memory options of one micro-batch each, in order of price."""
        start = replace(self.start, state_offload=offload)
        asked = (start.activation_checkpointing, start.selective_checkpointing)
        checkpointing = _CHECKPOINTING[_CHECKPOINTING.index(asked) :]
        dtypes: list[StateDtype] = [start.state_dtype]
        if self.on_gpu and start.state_dtype != "int8":
            dtypes.append("int8")
        for release, (checkpoints, selective), dtype in product(
            self._choices("gradient_release"), checkpointing, dtypes
        ):
            memory_options = replace(
                start,
                activation_checkpointing=checkpoints,
                selective_checkpointing=selective,
                state_dtype=dtype,
            )
            if release:
                memory_options = replace(
                    memory_options,
                    micro_batch_size=start.batch_size,
                    accumulate_grad_batches=1,
                    gradient_release=True,
                )
            yield memory_options

    def _best(
        self, base: MemoryOptions, fits: Callable[[MemoryOptions], bool]
    ) -> MemoryOptions | None:
        """Find the largest micro-batch that fits, with the loss in one piece if that fits too."""

        # Chunks save logits, but each makes a gradient of the head; a few rows have fewer logits.
        def either_fits(memory_options: MemoryOptions) -> bool:
            return fits(self._whole(memory_options)) or fits(memory_options)

        first, rest = (ways := self._micro_batches(base))[:1], ways[1:]
        found = first[0] if first and either_fits(first[0]) else _largest(rest, either_fits)
        if found is None:
            return None
        return self._whole(found) if fits(self._whole(found)) else found

    def _micro_batches(self, base: MemoryOptions) -> list[MemoryOptions]:
        """List what to split the batch into, the largest first; with release, it stays whole."""
        batch, largest = base.batch_size, base.micro_batch_size
        least = batch if base.gradient_release else 1
        if base.selective_checkpointing and not self.start.selective_checkpointing:
            least = max(least, self.selective_rows)
        return [
            replace(
                base,
                micro_batch_size=size,
                accumulate_grad_batches=batch // size,
                chunked_loss=self.start.chunked_loss or size >= self.chunked_rows,
            )
            for size in range(largest, least - 1, -1)
            if batch % size == 0
        ]

    def _whole(self, memory_options: MemoryOptions) -> MemoryOptions:
        return replace(memory_options, chunked_loss=self.start.chunked_loss)


def _fits_at(fits: Fits, level: int, memory_options: MemoryOptions) -> bool:
    return fits(memory_options, level)


def _largest(
    stage: list[MemoryOptions], fits: Callable[[MemoryOptions], bool]
) -> MemoryOptions | None:
    """Find the first that fits, by bisection.

    The micro-batch before them may not accumulate. They do, so they may need more than it:
    gradients are alive in their forward passes.
    """
    if not stage or not fits(stage[-1]):
        return None
    low, high = 0, len(stage) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(stage[middle]):
            high = middle
        else:
            low = middle + 1
    return stage[low]


def _price(memory_options: MemoryOptions) -> tuple[int, ...]:
    checkpointing = (
        memory_options.activation_checkpointing,
        memory_options.selective_checkpointing,
    )
    return (
        memory_options.state_offload,
        memory_options.gradient_release,
        _CHECKPOINTING.index(checkpointing),
        memory_options.state_dtype == "int8",
        memory_options.accumulate_grad_batches,
        memory_options.chunked_loss,
    )


# Forward, and in backward the gradients of both factors.
_PASSES = 3
_CHOOSING_SECONDS = 5e-3


def option_costs(
    memory_options: MemoryOptions, shapes: Mapping[str, tuple[int, ...]], state_bytes: int
) -> dict[str, str]:
    """Say what the memory options that are pulled cost in speed, in words.

    Work is counted in products of matrices, which are nearly all of a step; attention's own, a few
    percent at short rows, is left out. It is a model, not a measurement.

    Args:
        memory_options: The memory options.
        shapes: Shape of every parameter by name, in elements.
        state_bytes: Bytes of optimizer state.

    Returns:
        By field of `Memory options`, the pulled ones only.
    """
    decoder, head = _products(shapes)
    step = _PASSES * (decoder + head)
    found = {}
    if memory_options.chunked_loss:
        found["chunked_loss"] = f"{head / step:.1%} more compute: logits recomputed"
    if memory_options.accumulate_grad_batches > 1:
        found["accumulate_grad_batches"] = "no slowdown while each micro-batch keeps the GPU busy"
    if memory_options.selective_checkpointing:
        found["selective_checkpointing"] = "reruns all but matrix products"
    elif memory_options.activation_checkpointing:
        found["activation_checkpointing"] = f"{decoder / step:.0%} more compute: forward rerun"
    if memory_options.gradient_release:
        found["gradient_release"] = "no slowdown; batch is not split"
    if memory_options.state_dtype == "int8":
        found["state_dtype"] = "moments are rounded stochastically to one byte"
    if memory_options.state_offload:
        crossing = format_bytes(2 * state_bytes)
        found["state_offload"] = f"{crossing} cross the PCIe bus every step"
    return found


def selective_rows(
    shapes: Mapping[str, tuple[int, ...]], sequence_length: int, *, on_gpu: bool
) -> int:
    """Count the rows from which a micro-batch is worth checkpointing selectively.

    torch chooses what to keep operator by operator, in Python: 5 ms for each layer, forward and
    backward (4.4 to 4.7 ms more than whole checkpointing, measured on a 2.5 GHz core). In that time
    the products of a few rows are made again. That a device makes 1e14 of them a second, and a CPU
    1e11, is an assumption.

    Args:
        shapes: Shape of every parameter by name, in elements.
        sequence_length: Tokens in a row.
        on_gpu: Whether a GPU makes the products.
    """
    decoder, _ = _products(shapes)
    num_layers = len({layer_of(name) for name in shapes} - {None})
    per_row = 2 * sequence_length * decoder / max(1, num_layers)
    return math.ceil(_CHOOSING_SECONDS * (1e14 if on_gpu else 1e11) / max(1.0, per_row))


def _products(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Count the weights that multiply in the decoder and in the head, whoever owns the latter."""
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) > 1}
    decoder = sum(size for name, size in matrices.items() if layer_of(name) is not None)
    outside = [size for name, size in matrices.items() if layer_of(name) is None]
    return decoder, max(outside, default=0)
