"""The memory account of a run: every byte of its peak under a name, before it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foam_lightning.memory.trace import (
    Peak,
    Precision,
    Traceable,
    autocast_for,
    fake_tensors,
    track_step,
)
from foam_lightning.optim.fold import folded_shape
from foam_lightning.plan import FoldPlan, StateDtype

# What a CUDA process holds outside torch's counters: its context and the modules loaded into it.
# Reports range from 0.3 to 0.6 GB on an otherwise empty card; not calibrated per card yet.
GPU_CONTEXT_BYTES = 600_000_000
# Share of the traced peak that the caching allocator may add by rounding and fragmentation, and
# that operators may use inside, cuBLAS above all. Not calibrated per card yet.
GPU_MARGIN = 0.04


class Trainee(Traceable, Protocol):
    """A model that can be traced together with the optimizer of its plan."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer of the plan."""
        ...


@dataclass(frozen=True)
class Account:
    """The predicted peak of one device, term by term.

    Attributes:
        breakdown: Bytes by term at the moment of the peak: weights, gradients, optimizer_state,
            activations, loss, workspace, context, margin.
    """

    breakdown: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        """The peak: the sum of the terms."""
        return sum(self.breakdown.values())

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(self.breakdown, key=lambda term: self.breakdown[term])


@dataclass(frozen=True, kw_only=True)
class Accountant:
    """Predict the peak of plans for one model, on fake tensors and without a GPU.

    Args:
        make: Lays the model out and sets it to a plan; called in fake mode.
        vocab_size: Tokens that the model knows.
        sequence_length: Tokens in a row.
        precision: Lightning's name of the precision.
        on_gpu: Whether the run will be on a GPU, and so holds a context and needs a margin.
    """

    make: Callable[[FoldPlan], Trainee]
    vocab_size: int
    sequence_length: int
    precision: Precision
    on_gpu: bool

    def account(self, plan: FoldPlan) -> Account:
        """Trace one training step of this plan and name every byte of its peak."""
        peak = self.trace(plan)
        return Account(
            {
                **peak.terms,
                "context": GPU_CONTEXT_BYTES if self.on_gpu else 0,
                "margin": int(peak.total_bytes * GPU_MARGIN) if self.on_gpu else 0,
            }
        )

    def trace(self, plan: FoldPlan) -> Peak:
        """Trace one training step of this plan, without what the device adds."""
        size = (plan.levers.micro_batch_size, self.sequence_length)

        def make_batch() -> tuple[Tensor, Tensor]:
            token_ids = torch.zeros(size, dtype=torch.int64)
            return token_ids, token_ids

        with fake_tensors(self.precision):
            module = self.make(plan)
            return track_step(
                module,
                module.optimizer(),
                make_batch,
                accumulate_grad_batches=plan.levers.accumulate_grad_batches,
                autocast=autocast_for(self.precision),
            )


def optimizer_state_bytes(
    shapes: Mapping[str, tuple[int, ...]], levels: Mapping[str, int], dtype: StateDtype
) -> int:
    """Count the bytes of both moments of every parameter, by formula.

    `2 * itemsize * sum(numel(folded_shape(shape, level)))`, exactly what the optimizer allocates.

    Args:
        shapes: Shape of every parameter by name, in elements.
        levels: Fold level by name; a parameter that is not named is not folded.
        dtype: The dtype of the moments.
    """
    numbers = sum(
        torch.Size(folded_shape(shape, levels.get(name, 0))).numel()
        for name, shape in shapes.items()
    )
    return 2 * getattr(torch, dtype).itemsize * int(numbers)
