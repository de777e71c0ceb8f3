"""The tensors behind a peak, by the module that made them."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from foam_lightning.memory.timeline import TERMS, Moment, Origin, Term, Timeline
from foam_lightning.optim.state import state_layout
from foam_lightning.plan import FoldPlan

# Weights and state are there from the first step to the last.
_ALWAYS = "throughout"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Holding:
    """Tensors that are alike.

    Attributes:
        size: Bytes of each.
        count: How many there are.
        term: Of the account.
        origin: Where they come from; the number of a layer is a star where they are of several.
    """

    size: int
    count: int
    term: Term
    origin: Origin

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return self.size * self.count


class Peak(NamedTuple):
    """A peak, and when it is.

    Attributes:
        terms: Bytes by term.
        moment: Of the forward and backward passes; None once they are over.
        updated: The parameter whose update it is in, if it is in one.
    """

    terms: dict[str, int]
    moment: Moment | None
    updated: str | None


def tensors_at(
    peak: Peak,
    passes: Timeline,
    update: Timeline | None,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    buckets: Iterable[int],
    plan: FoldPlan,
    dtype: torch.dtype,
) -> list[Holding]:
    """List every tensor at a peak, the most bytes first; together they are its terms.

    Args:
        peak: The peak.
        passes: Forward and backward, with origins.
        update: That of the parameter that the peak is in the update of, with origins.
        shapes: Of the parameters by name, as one device has them.
        buckets: Bytes of each bucket of gradients, which stand from the first step on.
        plan: Its levels, and how state is kept.
        dtype: Of weights and gradients.
    """
    memory_options = plan.memory_options
    found = [*_of_parameters(shapes, "weights", dtype, _ALWAYS)]
    if not memory_options.state_offload:
        found += _of_state(shapes, plan, "optimizer_state", _ALWAYS)
    if peak.moment is None:
        found += _of_parameters(shapes, "gradients", dtype, "backward")
    else:
        passing: set[Term] = {*TERMS} - {"weights", "optimizer_state"}
        found += _of_timeline(passes, peak.moment, passing)
        for size in () if memory_options.gradient_release else buckets:
            origin = Origin("bucket of gradients", _ALWAYS, (size // dtype.itemsize,), dtype)
            found.append(Holding(size, 1, "gradients", origin))
    if update is not None and peak.updated is not None:
        found += _of_timeline(update, update.peak(), {"workspace"})
        if memory_options.state_offload:
            found += _of_state({peak.updated: shapes[peak.updated]}, plan, "workspace", "update")
    return _merged(found)


def _merged(holdings: Iterable[Holding]) -> list[Holding]:
    """Join what differs in the number of the layer alone; the most bytes come first."""
    counts: Counter[Holding] = Counter()
    for holding in holdings:
        name = _NUMBER.sub("*", holding.origin.made_by)
        alike = replace(holding, count=1, origin=holding.origin._replace(made_by=name))
        counts[alike] += holding.count
    found = [replace(alike, count=count) for alike, count in counts.items() if count]
    return sorted(found, key=lambda holding: -holding.num_bytes)


def _of_parameters(
    shapes: Mapping[str, tuple[int, ...]], term: Term, dtype: torch.dtype, phase: str
) -> Iterator[Holding]:
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        yield Holding(size, 1, term, Origin(name, phase, shape, dtype))


def _of_state(
    shapes: Mapping[str, tuple[int, ...]], plan: FoldPlan, term: Term, phase: str
) -> Iterator[Holding]:
    dtype = getattr(torch, plan.memory_options.state_dtype)
    for name, shape in shapes.items():
        for key, kept in state_layout(shape, plan.levels.get(name, 0), dtype).items():
            origin = Origin(f"{name} {key}", phase, tuple(kept.shape), kept.dtype)
            yield Holding(kept.nbytes, 1, term, origin)


def _of_timeline(timeline: Timeline, moment: Moment, terms: set[Term]) -> Iterator[Holding]:
    record, wanted = timeline.record, {TERMS.index(term) for term in terms}
    for index, count in timeline.holdings(moment.time).items():
        if record.terms[index] in wanted and record.sizes[index]:
            term = TERMS[record.terms[index]]
            yield Holding(record.sizes[index], count, term, record.origins[index])
