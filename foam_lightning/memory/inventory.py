"""The tensors alive at the peak, grouped by the module that made them."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from foam_lightning.memory.timeline import TERMS, Moment, Origin, Term, Timeline
from foam_lightning.model.int8_weights import weight_layout
from foam_lightning.optim.state import state_layout
from foam_lightning.plan import FoldPlan

_ALWAYS = "throughout"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one kind.

    Attributes:
        size: Bytes of each.
        count: How many there are.
        term: Their term of the account.
        origin: Where they come from, with a star for the numbers of layers.
    """

    size: int
    count: int
    term: Term
    origin: Origin

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return self.size * self.count


class PeakMoment(NamedTuple):
    """A peak and its moment.

    Attributes:
        terms: Bytes by term.
        moment: The moment in the forward and backward passes.
        updated: The parameter that is updated at this moment; None if none is.
        summed: The parameter whose gradient is added at this moment to its sum in host memory.
    """

    terms: dict[str, int]
    moment: Moment
    updated: str | None = None
    summed: str | None = None


def group_tensors(
    peak: PeakMoment,
    passes: Timeline,
    update: Timeline | None,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    buckets: Iterable[int],
    sums_on_device: bool,
    plan: FoldPlan,
    dtype: torch.dtype,
) -> list[TensorGroup]:
    """List every tensor at a peak, the largest groups first; their bytes add up to its terms.

    Args:
        peak: The peak.
        passes: Timeline of forward and backward, with origins.
        update: Timeline of the update that the peak is in, with origins; None outside of updates.
        shapes: Shapes of the parameters by name, as one device holds them.
        buckets: Bytes of each gradient bucket of DDP.
        sums_on_device: Whether host memory, with the sums of gradients, is that of the device.
        plan: The plan that decides the state.
        dtype: The dtype of gradients, and of weights that are not in int8.
    """
    memory_options = plan.memory_options
    found = [*_of_weights(shapes, plan, dtype)]
    if not memory_options.state_offload:
        found += _of_state(shapes, plan, "optimizer_state", _ALWAYS)
    found += _of_timeline(passes, peak.moment, {*TERMS} - {"weights", "optimizer_state"})
    for size in buckets:
        origin = Origin("bucket of gradients", _ALWAYS, (size // dtype.itemsize,), dtype)
        found.append(TensorGroup(size, 1, "gradients", origin))
    if memory_options.grad_offload:
        found += _of_sums(peak, shapes, dtype, sums_on_device=sums_on_device)
    if update is not None and peak.updated is not None:
        found += _of_timeline(update, update.peak(), {"workspace"})
        if memory_options.state_offload:
            found += _of_state({peak.updated: shapes[peak.updated]}, plan, "workspace", "update")
    return _merged(found)


def _of_sums(
    peak: PeakMoment,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    sums_on_device: bool,
) -> Iterator[TensorGroup]:
    """List what is on the device of the sums of gradients."""
    norms = Origin("norms of sums", _ALWAYS, (len(shapes),), torch.float32)
    yield TensorGroup(torch.float32.itemsize * len(shapes), 1, "gradients", norms)
    if sums_on_device:
        alive: list[tuple[str | None, Term, str]] = [(n, "gradients", _ALWAYS) for n in shapes]
    else:
        alive = [(peak.updated, "workspace", "update"), (peak.summed, "workspace", "backward")]
    for name, term, phase in alive:
        if name is not None:
            size = math.prod(shapes[name]) * dtype.itemsize
            yield TensorGroup(size, 1, term, Origin(name, phase, shapes[name], dtype))


def _merged(groups: Iterable[TensorGroup]) -> list[TensorGroup]:
    """Join groups that differ only in the number of the layer, the largest first."""
    counts: Counter[TensorGroup] = Counter()
    for group in groups:
        name = _NUMBER.sub("*", group.origin.made_by)
        alike = replace(group, count=1, origin=group.origin._replace(made_by=name))
        counts[alike] += group.count
    found = [replace(alike, count=count) for alike, count in counts.items() if count]
    return sorted(found, key=lambda group: -group.num_bytes)


def _of_weights(
    shapes: Mapping[str, tuple[int, ...]], plan: FoldPlan, dtype: torch.dtype
) -> Iterator[TensorGroup]:
    for name, shape in shapes.items():
        for kept, kept_dtype in weight_layout(
            name, shape, dtype, plan.memory_options.weights_dtype
        ):
            size = math.prod(kept) * kept_dtype.itemsize
            yield TensorGroup(size, 1, "weights", Origin(name, _ALWAYS, kept, kept_dtype))


def _of_state(
    shapes: Mapping[str, tuple[int, ...]], plan: FoldPlan, term: Term, phase: str
) -> Iterator[TensorGroup]:
    dtype = getattr(torch, plan.memory_options.state_dtype)
    for name, shape in shapes.items():
        for key, kept in state_layout(shape, plan.levels.get(name, 0), dtype).items():
            origin = Origin(f"{name} {key}", phase, tuple(kept.shape), kept.dtype)
            yield TensorGroup(kept.nbytes, 1, term, origin)


def _of_timeline(timeline: Timeline, moment: Moment, terms: set[Term]) -> Iterator[TensorGroup]:
    record, wanted = timeline.record, {TERMS.index(term) for term in terms}
    for index, count in timeline.count_alive(moment.time).items():
        if record.terms[index] in wanted and record.sizes[index]:
            term = TERMS[record.terms[index]]
            yield TensorGroup(record.sizes[index], count, term, record.origins[index])
