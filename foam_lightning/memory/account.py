"""The memory account of a run: every byte of its peak under a name, before it trains."""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from foam_lightning.distributed.topology import ONE_DEVICE, Devices
from foam_lightning.memory.allocator import Margin, Update, Usage, replay, training
from foam_lightning.memory.device import DeviceCosts
from foam_lightning.memory.distributed import NCCL_BYTES, buckets, communicators, one_of
from foam_lightning.memory.inventory import Holding, Peak, tensors_at
from foam_lightning.memory.timeline import TERMS, Timeline
from foam_lightning.memory.trace import (
    Step,
    Traceable,
    autocast_for,
    fake_tensors,
    track_optimizer_step,
    track_step,
    weight_dtype,
)
from foam_lightning.optim.state import state_layout
from foam_lightning.plan import FoldPlan, MemoryOptions, StateDtype
from foam_lightning.settings import Precision

# Lightning keeps up to 28 bytes of running mean for each value that is logged, the training step a
# few scalars. A full run on a CPU was measured at 216 bytes.
_LOGGED_BYTES = 256


class AccountedModel(Protocol):
    """The model to account for, at any depth."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's shape by its qualified name."""
        ...

    def llama_config(self) -> Any:
        """Describe the model; `hidden_size` is what one layer hands to the next for each token."""
        ...

    def build_for_trace(self, memory_options: MemoryOptions, num_layers: int) -> Traceable:
        """Lay the model out with these memory options and so many layers, in fake mode."""
        ...

    def make_optimizer(
        self, named_parameters: Iterable[tuple[str, Tensor]], plan: FoldPlan
    ) -> torch.optim.Optimizer:
        """Make the optimizer of a plan."""
        ...


@dataclass(frozen=True)
class Account:
    """The predicted peak of one device, term by term.

    Attributes:
        breakdown: Bytes by term at the moment of the peak: weights, gradients, optimizer_state,
            activations, loss, workspace, context, margin.
        devices: How many there are.
    """

    breakdown: Mapping[str, int]
    devices: int = 1

    @property
    def peak_bytes(self) -> int:
        """The peak: the sum of the terms."""
        return sum(self.breakdown.values())

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(self.breakdown, key=lambda term: self.breakdown[term])


class Accountant:
    """Predict the peak of plans for one model, on fake tensors and without a GPU.

    The forward and backward passes do not depend on the levels, and the optimizer's workspace
    does not depend on the batch, so each is traced once and kept. With gradient release the
    workspace of each parameter is added to what is alive at the moment of its update.

    On a GPU, context and the workspace of cuBLAS are given, as measured or by default. What the
    caching allocator reserves beyond the tensors is replayed (see `allocator` and `margin`): the
    weights, then two steps through all layers, with the state made in the first. It is on the safe
    side in that an allocator short of memory gives cached segments back; it does not see what
    operators other than cuBLAS take inside, nor mixed levels. No GPU has measured it yet.

    Args:
        trainee: The model.
        num_layers: Its decoder layers.
        sequence_length: Tokens in a row.
        precision: Lightning's name of the precision.
        on_gpu: Whether the run will be on a GPU, and so holds a context and needs a margin.
        devices: Those of the run; the account is of the first, and no other needs more.
        costs: What a GPU takes beside the tensors; by default that of one never measured.
    """

    def __init__(
        self,
        trainee: AccountedModel,
        *,
        num_layers: int,
        sequence_length: int,
        precision: Precision,
        on_gpu: bool,
        devices: Devices = ONE_DEVICE,
        costs: DeviceCosts | None = None,
    ) -> None:
        self._trainee = trainee
        self._costs = costs or DeviceCosts()
        self._devices = devices
        self._shapes = {name: devices.shard_shape(shape) for name, shape in trainee.shapes.items()}
        self._num_layers = num_layers
        self._width = num_layers * int(trainee.llama_config().hidden_size)
        self._sequence_length = sequence_length
        self._precision = precision
        self._on_gpu = on_gpu
        self._passes: dict[MemoryOptions, Step] = {}
        self._workspaces: dict[tuple[tuple[int, ...], int, StateDtype], int] = {}
        self._margin = Margin(
            lambda plan: self.usage(plan), self._state_bytes, self._costs.workspace
        )

    def account(self, plan: FoldPlan) -> Account:
        """Name every byte of the peak of one training step of this plan."""
        return Account(
            {
                **self.trace(plan),
                "context": self.context,
                "margin": self._margin.of(plan) if self._on_gpu else 0,
            },
            self._devices.count,
        )

    def trace(self, plan: FoldPlan) -> dict[str, int]:
        """Give the peak by term as tensors make it, without what the device adds."""
        return self._peak(plan, self._traced_passes(plan.memory_options)).terms

    def tensors(self, plan: FoldPlan) -> list[Holding]:
        """List every tensor behind `trace`, the largest first; together they are its bytes.

        It takes a trace of its own, which notes where tensors come from.
        """
        passes = self._track(plan.memory_options, noted=True)
        peak = self._peak(plan, passes)
        name = peak.updated
        return tensors_at(
            peak,
            passes.timeline,
            None if name is None else self._update(plan, name, self._shapes[name], noted=True),
            shapes=self._shapes,
            buckets=self._buckets,
            plan=plan,
            dtype=weight_dtype(self._precision),
        )

    def _peak(self, plan: FoldPlan, passes: Step) -> Peak:
        standing = self._standing(plan)
        workspaces = {named[0]: self._beside(plan, *named) for named in self._shapes.items()}
        before_step: dict[str, int] = dict(passes.peak.terms.items())
        before_step["gradients"] += sum(self._buckets)
        peaks = [Peak(before_step, passes.peak, None)]
        if plan.memory_options.gradient_release:
            for update, name in zip(passes.updates, workspaces, strict=True):
                terms: dict[str, int] = dict(update.terms.items())
                terms["workspace"] += workspaces[name]
                peaks.append(Peak(terms, update, name))
        else:  # updates come one after the other, when backward has left all gradients behind
            largest = max(workspaces, key=lambda name: workspaces[name])
            step: dict[str, int] = {**dict.fromkeys(TERMS, 0), "workspace": workspaces[largest]}
            peaks.append(Peak({**step, "gradients": standing["weights"]}, None, largest))
        return max(
            (peak._replace(terms={**peak.terms, **standing}) for peak in peaks),
            key=lambda peak: sum(peak.terms.values()),
        )

    def fits(self, plan: FoldPlan, budget_bytes: int) -> bool:
        """Tell whether the peak of a plan is within a budget, without a trace where it can."""
        return (
            self.lower_bound(plan) <= budget_bytes
            and sum(self.trace(plan).values()) + self.context <= budget_bytes
            and self.account(plan).peak_bytes <= budget_bytes
        )

    def lower_bound(self, plan: FoldPlan) -> int:
        """Count bytes that the peak of a plan is never below, without a trace."""
        standing, memory_options = self._standing(plan), plan.memory_options
        # Whatever is recomputed, the inputs of all layers are alive where backward begins, and
        # gradients, if they are kept, where it ends; from the second micro-batch on, both.
        tokens = memory_options.micro_batch_size * self._sequence_length
        inputs = tokens * self._width * weight_dtype(self._precision).itemsize
        gradients = 0 if memory_options.gradient_release else standing["weights"]
        accumulates = memory_options.accumulate_grad_batches > 1
        passing = inputs + gradients if accumulates else max(inputs, gradients)
        return self.context + sum(standing.values()) + passing

    def usage(self, plan: FoldPlan, *, expandable: bool = False) -> Usage:
        """Replay the caching allocator over two steps, without the workspace of cuBLAS.

        Args:
            plan: Every layer must have the levels of the others.
            expandable: Whether the allocator's segments may grow.
        """
        shapes = self._shapes
        updates = []
        for name, shape in shapes.items():
            kept = _kept_bytes(shape, plan.levels.get(name, 0), plan.memory_options.state_dtype)
            state = () if plan.memory_options.state_offload else kept
            updates.append(Update(state, self._beside(plan, name, shape)))
        itemsize = weight_dtype(self._precision).itemsize
        weights = [math.prod(shape) * itemsize for shape in shapes.values()]
        step = self._traced_passes(plan.memory_options).events
        kept_whole = [*weights, *self._buckets]
        return replay(training(kept_whole, step, updates), expandable=expandable)

    def state_change(self, plan: FoldPlan, slack_bytes: int) -> int:
        """Tell by how many bytes the state may change for the peak to change by so many.

        The margin changes with the state, and with it; the rest of the peak is taken as it is.

        Args:
            plan: Where the change starts from.
            slack_bytes: Bytes more for the peak, or fewer if below 0.
        """
        if not self._on_gpu or plan.memory_options.state_offload:
            return slack_bytes
        return self._margin.state_change(plan, slack_bytes)

    @cached_property
    def context(self) -> int:
        """Bytes that the process takes outside torch's allocator: its context, and NCCL's own."""
        if not self._on_gpu:
            return 0
        return self._costs.context + communicators(self._devices) * NCCL_BYTES

    @cached_property
    def _buckets(self) -> list[int]:
        itemsize = weight_dtype(self._precision).itemsize
        return buckets(self._devices, (math.prod(s) * itemsize for s in self._shapes.values()))

    def _standing(self, plan: FoldPlan) -> dict[str, int]:
        """Count what is there from the first step to the last."""
        elements = sum(math.prod(shape) for shape in self._shapes.values())
        return {
            "weights": elements * weight_dtype(self._precision).itemsize,
            "optimizer_state": 0 if plan.memory_options.state_offload else self._state_bytes(plan),
        }

    def _state_bytes(self, plan: FoldPlan) -> int:
        return optimizer_state_bytes(self._shapes, plan.levels, plan.memory_options.state_dtype)

    def _traced_passes(self, memory_options: MemoryOptions) -> Step:
        # How state is kept does not show in the passes.
        memory_options = replace(memory_options, state_dtype="float32", state_offload=False)
        if memory_options not in self._passes:
            self._passes[memory_options] = self._track(memory_options)
        return self._passes[memory_options]

    def _track(self, memory_options: MemoryOptions, *, noted: bool = False) -> Step:
        size = (memory_options.micro_batch_size, self._sequence_length)

        def make_batch() -> tuple[Tensor, Tensor]:
            # Two tensors, as the data loader gives them, though the tokens are the same.
            return torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)

        with one_of(self._devices, self._precision) as join, fake_tensors(self._precision):
            num_seen = 4 if self._devices.shards else 3
            twin = self._trainee.build_for_trace(memory_options, min(self._num_layers, num_seen))
            join(twin)
            return track_step(
                twin,
                None,
                make_batch,
                accumulate_grad_batches=memory_options.accumulate_grad_batches,
                gradient_release=memory_options.gradient_release,
                autocast=autocast_for(self._precision),
                num_layers=self._num_layers,
                held={"logged values": torch.zeros(_LOGGED_BYTES, dtype=torch.uint8)},
                noted=noted,
            )

    def _beside(self, plan: FoldPlan, name: str, shape: tuple[int, ...]) -> int:
        """Count what the update of one parameter brings to the device and takes away again."""
        visiting = optimizer_state_bytes(
            {name: shape}, plan.levels, plan.memory_options.state_dtype
        )
        return self._workspace(plan, name, shape) + visiting * plan.memory_options.state_offload

    def _workspace(self, plan: FoldPlan, name: str, shape: tuple[int, ...]) -> int:
        """Trace what the update of one parameter needs beside it, its gradient and its state."""
        key = (shape, plan.levels.get(name, 0), plan.memory_options.state_dtype)
        if key not in self._workspaces:
            update = self._update(plan, name, shape)
            self._workspaces[key] = update.peak().terms["workspace"]
        return self._workspaces[key]

    def _update(
        self, plan: FoldPlan, name: str, shape: tuple[int, ...], *, noted: bool = False
    ) -> Timeline:
        # The kernel of the CPU has no temporary, and goes by the device of fake tensors. An update
        # compiled for a GPU has some, within what the plain one has: operators that any device has,
        # in a third of the time on meta tensors. What visits from the host is counted apart.
        dtype, device = weight_dtype(self._precision), "meta" if self._on_gpu else "cpu"
        alone = replace(
            plan,
            levels={name: plan.levels[name]} if name in plan.levels else {},
            memory_options=replace(plan.memory_options, state_offload=False),
        )
        with nullcontext() if self._on_gpu else fake_tensors(self._precision):
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            parameter.grad = torch.empty_like(parameter)
            optimizer = self._trainee.make_optimizer([(name, parameter)], alone)
            for group in optimizer.param_groups:
                group["fused"] = not self._on_gpu
            return track_optimizer_step(optimizer, noted=name if noted else None)


def optimizer_state_bytes(
    shapes: Mapping[str, tuple[int, ...]], levels: Mapping[str, int], dtype: StateDtype
) -> int:
    """Count the bytes of the state of every parameter, by formula: what the optimizer allocates.

    Args:
        shapes: Shape of every parameter by name, in elements.
        levels: Fold level by name; a parameter that is not named is not folded.
        dtype: The dtype of the moments.
    """
    return sum(
        sum(_kept_bytes(shape, levels.get(name, 0), dtype)) for name, shape in shapes.items()
    )


@cache
def _kept_bytes(shape: tuple[int, ...], level: int, dtype: StateDtype) -> tuple[int, ...]:
    """Count the bytes of every tensor of the state of one parameter."""
    return tuple(kept.nbytes for kept in state_layout(shape, level, getattr(torch, dtype)).values())
