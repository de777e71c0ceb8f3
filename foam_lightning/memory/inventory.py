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
    """

    terms: dict[str, int]
    moment: Moment
    updated: str | None


def group_tensors(
    peak: PeakMoment,
    passes: Timeline,
    update: Timeline | None,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    buckets: Iterable[int],
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
    if update is not None and peak.updated is not None:
        found += _of_timeline(update, update.peak(), {"workspace"})
        if memory_options.state_offload:
            found += _of_state({peak.updated: shapes[peak.updated]}, plan, "workspace", "update")
    return _merged(found)


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
