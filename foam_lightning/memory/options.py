"""Memory options in order of their cost in speed: the fastest that fit, and what each one costs."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from foam_lightning.model.roles import layer_of
from foam_lightning.plan import MemoryOptions, StateDtype
from foam_lightning.units import format_bytes

# Slower options are turned on as long as they let every matrix fold at this level, that of the
# paper's main results; only then do higher levels come in.
TARGET_LEVEL = 2
# Levels above 8 save next to nothing: two moments of a matrix are 1/256 of Adam's here.
MAX_LEVEL = 8

Fits = Callable[[MemoryOptions, int], bool]
# Activation and selective checkpointing, from the fastest to the slowest.
_CHECKPOINTING = ((False, False), (True, True), (True, False))


@dataclass(frozen=True)
class OptionLadder:
    """Every set of memory options that a job may train with, from the fastest to the slowest.

    From the slowest option to the fastest: gradients summed in host memory (all of them cross the
    bus twice in each micro-batch, so that then their number comes next but one), state in host
    memory (it crosses the bus twice a step), gradient release (without such sums the whole batch is
    one micro-batch), activation checkpointing (the forward
    pass is run again), selective checkpointing (all of it is run again but matrix products and
    attention), state in int8, more and smaller micro-batches, chunked loss (nothing is computed
    again, but in bfloat16 the gradient of the head is rounded once a chunk). Two sets are compared
    by the slowest option in which they differ. So an option is turned on only where all faster ones
    together do not save enough.

    Args:
        start: The memory options of the configuration; none of them is ever turned off.
        on_gpu: Whether state may be int8, and state and sums of gradients in host memory. On a CPU
            the update of int8 state is not compiled and takes 30 times as long, and there is no
            other memory.
        can_release: Whether gradients may be released, which needs a run on one device
            and no gradient scaler.
        clips_all: Whether gradients are clipped together. Of released ones only the sums can be.
        min_selective_rows: Rows of a micro-batch from which selective checkpointing is the faster
            one; with fewer it is left out.
        min_chunked_rows: Rows of a micro-batch from which its loss is more than one chunk; with
            fewer the loss is not chunked.
    """

    start: MemoryOptions
    on_gpu: bool = True
    can_release: bool = True
    clips_all: bool = False
    min_selective_rows: int = 1
    min_chunked_rows: int = 1

    def find_fastest(self, fits: Fits) -> MemoryOptions | None:
        """Find the fastest memory options that fit.

        State goes to host memory only where no level fits on the device: on the models measured so
        far, levels 1 to 8 differ by less than that costs.

        Args:
            fits: Whether a run with these memory options fits at one uniform level.

        Returns:
            The fastest that fit at level 2, else at level 8, else None.
        """
        for offloaded, level in product(self._offloaded(), (TARGET_LEVEL, MAX_LEVEL)):
            best = None
            for base in self._bases(offloaded):
                found = self._largest_micro_batch(base, level, fits, best)
                if found is not None and not found.grad_offload:
                    return found
                best = found or best
            if best is not None:
                return best
        return None

    def candidates_for_minimum(self) -> list[MemoryOptions]:
        """List the memory options of which one needs the least memory, the fastest first.

        Which one depends on the model: an option that saves activations may cost gradients.
        Accumulation holds them during the forward passes, gradient release cannot split the batch,
        and a sum from host memory is on the device beside the gradient that is added to it.
        """
        # A later base replaces an earlier one, so that the slowest stays, with and without release.
        slowest = {
            (base.gradient_release, base.grad_offload): base
            for offloaded in self._offloaded()
            for base in self._bases(offloaded)
        }.values()
        sizes = [self._micro_batches(base) for base in slowest]
        ends = [end for options in sizes for end in (options[0], options[-1])]
        return list(dict.fromkeys(each for end in ends for each in (self._unchunked(end), end)))

    def find_smaller(
        self, memory_options: MemoryOptions, peak: Callable[[MemoryOptions], int | None]
    ) -> MemoryOptions | None:
        """Find the fastest memory options that are slower than these and need less memory.

        The dtype of the state is kept, so that a checkpoint serves both.

        Args:
            memory_options: Those of a run that ran out of memory.
            peak: Predicts the peak of the run with other memory options, in bytes; None where the
                settings do not allow them.

        Returns:
            None if there are none.
        """
        now, before = _speed_rank(memory_options), peak(memory_options)
        chunked = [
            found
            for offloaded in self._offloaded()
            for base in self._bases(offloaded)
            for found in self._micro_batches(base)
        ]
        for found in sorted({*chunked, *map(self._unchunked, chunked)}, key=_speed_rank):
            if _speed_rank(found) <= now or found.state_dtype != memory_options.state_dtype:
                continue
            after = peak(found)
            if after is not None and (before is None or after < before):
                return found
        return None

    def _choices(self, option: str) -> list[bool]:
        if getattr(self.start, option):
            return [True]
        if option == "gradient_release" and self.start.weights_dtype == "int8":
            return [True]
        allowed = {
            "state_offload": self.on_gpu,
            "gradient_release": self.can_release,
            # For one micro-batch, release alone does the same.
            "grad_offload": self.on_gpu
            and self.can_release
            and (self.clips_all or self.start.batch_size > 1),
        }
        return [False, True] if allowed[option] else [False]

    def _release_choices(self, sums: bool) -> list[bool]:
        if sums:
            return [True]
        # On a CPU, where gradients are not summed, the error says which setting to change.
        only_sums = self.clips_all and self.on_gpu and not self.start.gradient_release
        choices = self._choices("gradient_release")
        return [choice for choice in choices if not (choice and only_sums)]

    def _offloaded(self) -> list[tuple[bool, bool]]:
        """List what may be in host memory, gradients and state, the fastest first."""
        return list(product(self._choices("grad_offload"), self._choices("state_offload")))

    def _bases(self, offloaded: tuple[bool, bool]) -> Iterator[MemoryOptions]:
        """Yield memory options that differ in more than the micro-batch, the fastest first."""
        sums, state = offloaded
        start = replace(self.start, state_offload=state)
        asked = (start.activation_checkpointing, start.selective_checkpointing)
        checkpointing = _CHECKPOINTING[_CHECKPOINTING.index(asked) :]
        dtypes: list[StateDtype] = [start.state_dtype]
        if self.on_gpu and start.state_dtype != "int8":
            dtypes.append("int8")
        for release, (checkpoints, selective), dtype in product(
            self._release_choices(sums), checkpointing, dtypes
        ):
            is_whole = release and not sums
            yield replace(
                start,
                grad_offload=sums,
                micro_batch_size=start.batch_size if is_whole else start.micro_batch_size,
                accumulate_grad_batches=1 if is_whole else start.accumulate_grad_batches,
                activation_checkpointing=checkpoints,
                selective_checkpointing=selective,
                gradient_release=release,
                state_dtype=dtype,
            )

    def _largest_micro_batch(
        self, base: MemoryOptions, level: int, fits: Fits, best: MemoryOptions | None
    ) -> MemoryOptions | None:
        """Find the largest micro-batch that fits, without chunks of the loss if that fits too.

        It has to be larger than that of `best`.
        """

        # Chunks save logits, but the gradient of the head is there while each makes its own; a few
        # rows have fewer logits.
        def either_fits(memory_options: MemoryOptions) -> bool:
            return fits(self._unchunked(memory_options), level) or fits(memory_options, level)

        # The first may not accumulate. The others do, so they may need more than it: gradients are
        # alive in their forward passes.
        above = 0 if best is None else best.micro_batch_size
        sizes = [each for each in self._micro_batches(base) if each.micro_batch_size > above]
        first, rest = sizes[:1], sizes[1:]
        if first and either_fits(first[0]):
            found = first[0]
        elif rest and either_fits(rest[-1]):
            found = rest[bisect_left(rest[:-1], True, key=either_fits)]
        else:
            return None
        return self._unchunked(found) if fits(self._unchunked(found), level) else found

    def _micro_batches(self, base: MemoryOptions) -> list[MemoryOptions]:
        """List the sizes of a micro-batch, the largest first; with release the batch is whole."""
        batch, largest = base.batch_size, base.micro_batch_size
        smallest = batch if base.updates_in_backward else 1
        if base.selective_checkpointing and not self.start.selective_checkpointing:
            smallest = max(smallest, self.min_selective_rows)
        return [
            replace(
                base,
                micro_batch_size=size,
                accumulate_grad_batches=batch // size,
                chunked_loss=self.start.chunked_loss or size >= self.min_chunked_rows,
            )
            for size in range(largest, smallest - 1, -1)
            if batch % size == 0
        ]

    def _unchunked(self, memory_options: MemoryOptions) -> MemoryOptions:
        return replace(memory_options, chunked_loss=self.start.chunked_loss)


def _speed_rank(memory_options: MemoryOptions) -> tuple[int, ...]:
    """A key that sorts memory options from the fastest to the slowest."""
    checkpointing = (
        memory_options.activation_checkpointing,
        memory_options.selective_checkpointing,
    )
    return (
        memory_options.grad_offload,
        memory_options.state_offload,
        memory_options.accumulate_grad_batches if memory_options.grad_offload else 0,
        memory_options.gradient_release,
        _CHECKPOINTING.index(checkpointing),
        memory_options.state_dtype == "int8",
        memory_options.accumulate_grad_batches,
        memory_options.chunked_loss,
    )


# The forward pass, and in backward the gradients of both factors of each product.
_PRODUCTS_PER_STEP = 3
_SECONDS_TO_SELECT = 5e-3


def option_costs(
    memory_options: MemoryOptions,
    shapes: Mapping[str, tuple[int, ...]],
    state_bytes: int,
    gradient_bytes: int,
) -> dict[str, str]:
    """Describe what the memory options that are on cost in speed.

    Work is counted in matrix products, nearly all of a step; attention, a few percent at short
    rows, is left out. This is a model, not a measurement.

    Args:
        memory_options: The memory options.
        shapes: Shape of every parameter by name, in elements.
        state_bytes: Bytes of optimizer state.
        gradient_bytes: Bytes of all gradients.

    Returns:
        A few words by field of `MemoryOptions`; fields that are off are left out.
    """
    decoder, head = _matrix_elements(shapes)
    step = _PRODUCTS_PER_STEP * (decoder + head)
    costs = {}
    if memory_options.chunked_loss:
        costs["chunked_loss"] = "no slowdown"
    if memory_options.accumulate_grad_batches > 1:
        costs["accumulate_grad_batches"] = "no slowdown while each micro-batch keeps the GPU busy"
    if memory_options.selective_checkpointing:
        costs["selective_checkpointing"] = "reruns all but matrix products"
    elif memory_options.activation_checkpointing:
        costs["activation_checkpointing"] = f"{decoder / step:.0%} more compute: forward rerun"
    if memory_options.gradient_release:
        is_whole = memory_options.updates_in_backward
        costs["gradient_release"] = "no slowdown" + ("; batch is not split" if is_whole else "")
    if memory_options.grad_offload:
        moved = 2 * gradient_bytes * memory_options.accumulate_grad_batches
        costs["grad_offload"] = f"{format_bytes(moved)} cross the PCIe bus every step"
    if memory_options.weights_dtype == "int8":
        costs["weights_dtype"] = "weights are rounded stochastically to one byte"
    if memory_options.state_dtype == "int8":
        costs["state_dtype"] = "moments are rounded stochastically to one byte"
    if memory_options.state_offload:
        costs["state_offload"] = f"{format_bytes(2 * state_bytes)} cross the PCIe bus every step"
    return costs


def min_rows_for_selective_checkpointing(
    shapes: Mapping[str, tuple[int, ...]], sequence_length: int, *, on_gpu: bool
) -> int:
    """Count the rows of a micro-batch from which selective checkpointing is the faster one.

    torch selects what to keep operator by operator, in Python: 5 ms for each layer, forward and
    backward (4.4 to 4.7 ms more than plain checkpointing, measured on a 2.5 GHz core). In that time
    the products of a few rows are computed again. That a GPU does 1e14 multiplications a second,
    and a CPU 1e11, is an assumption.

    Args:
        shapes: Shape of every parameter by name, in elements.
        sequence_length: Tokens in a row.
        on_gpu: Whether a GPU computes the products.
    """
    decoder, _ = _matrix_elements(shapes)
    num_layers = len({layer_of(name) for name in shapes} - {None})
    per_row = 2 * sequence_length * decoder / max(1, num_layers)
    return math.ceil(_SECONDS_TO_SELECT * (1e14 if on_gpu else 1e11) / max(1.0, per_row))


def _matrix_elements(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Count the elements of the decoder's matrices and of the head, tied or not."""
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) > 1}
    decoder = sum(size for name, size in matrices.items() if layer_of(name) is not None)
    outside = [size for name, size in matrices.items() if layer_of(name) is None]
    return decoder, max(outside, default=0)
