"""What every pulled lever costs, by a model of the step's work."""

import math
from collections.abc import Mapping

from foam_lightning.plan import Levers
from foam_lightning.roles import layer_of
from foam_lightning.units import in_words

# Forward, and in backward the gradients of both factors.
_PASSES = 3
_CHOOSING_SECONDS = 5e-3


def prices(
    levers: Levers, shapes: Mapping[str, tuple[int, ...]], state_bytes: int
) -> dict[str, str]:
    """Say what the levers that are pulled cost in speed, in words.

    Work is counted in products of matrices, which are nearly all of a step; attention's own, a few
    percent at short rows, is left out. It is a model, not a measurement.

    Args:
        levers: The levers.
        shapes: Shape of every parameter by name, in elements.
        state_bytes: Bytes of optimizer state.

    Returns:
        By field of `Levers`, the pulled ones only.
    """
    decoder, head = _products(shapes)
    step = _PASSES * (decoder + head)
    found = {}
    if levers.chunked_loss:
        found["chunked_loss"] = f"{head / step:.1%} more work: the head's product is made again"
    if levers.accumulate_grad_batches > 1:
        found["accumulate_grad_batches"] = "none while a micro-batch still fills the device"
    if levers.selective_checkpointing:
        found["selective_checkpointing"] = "no product is made again, only what lies between them"
    elif levers.activation_checkpointing:
        found["activation_checkpointing"] = f"{decoder / step:.0%} more work: forward is run again"
    if levers.gradient_release:
        found["gradient_release"] = "none; a step is one micro-batch"
    if levers.state_dtype == "int8":
        found["state_dtype"] = "moments are rounded at random to codes of one byte"
    if levers.state_offload:
        crossing = in_words(2 * state_bytes)
        found["state_offload"] = f"{crossing} cross the bus in every step"
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
