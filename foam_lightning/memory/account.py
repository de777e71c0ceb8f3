"""The memory account: the predicted peak of a run, term by term, before it trains."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from foam_lightning.distributed.topology import ONE_DEVICE, Devices
from foam_lightning.memory.allocator import (
    AllocatorMargin,
    AllocatorPeaks,
    ParameterUpdate,
    has_expandable_segments,
    replay,
    two_steps,
)
from foam_lightning.memory.device import DeviceCosts
from foam_lightning.memory.distributed import (
    NCCL_BYTES,
    as_first_device,
    bucket_sizes,
    num_communicators,
)
from foam_lightning.memory.inventory import PeakMoment, TensorGroup, group_tensors
from foam_lightning.memory.timeline import Timeline
from foam_lightning.memory.trace import (
    Step,
    Traceable,
    autocast_for,
    fake_tensors,
    track_optimizer_step,
    track_step,
    weight_dtype,
)
from foam_lightning.model.int8_weights import Int8Weight, is_int8, quantize, weight_layout
from foam_lightning.optim.state import state_layout
from foam_lightning.plan import FoldPlan, MemoryOptions, StateDtype
from foam_lightning.settings import Precision

# The share of a GPU's predicted peak that is kept free. Near its limit the allocator empties its
# cache and retries, at every step if the plan is tight, and what no account knows, as a kernel that
# is loaded later, ends in a restart. Against that, 2 % is little: in 24 GB, one 7B matrix in seven
# at level 3 instead of 2, where on small models levels 1 to 8 differ by less than 0.03 nats
# (docs/log.md).
_SLACK_PERCENT = 2

# Lightning keeps up to 28 bytes of running mean for each value that is logged, the training step a
# few scalars. A full run on a CPU was measured at 216 bytes.
_LOGGED_BYTES = 256
# A gradient scaler has its scale, a count and a flag, 4 bytes each, and makes one more scalar.
_SCALER_BYTES = 16


class AccountedModel(Protocol):
    """What the account needs of a model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's shape by its qualified name."""
        ...

    def llama_config(self) -> Any:
        """Return the configuration, which has the `hidden_size`."""
        ...

    def build_for_trace(self, memory_options: MemoryOptions, num_layers: int) -> Traceable:
        """Build an uninitialized copy with this number of layers and these memory options."""
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
            activations, loss, workspace, context, margin, slack.
        devices: The number of devices of the run.
        expandable_segments: Whether the margin is that of an allocator with expandable segments.
        host_bytes: Pinned host memory for state and sums of gradients, beside this peak. On a CPU
            there is no other memory than the device's, and this is 0.
    """

    breakdown: Mapping[str, int]
    devices: int = 1
    expandable_segments: bool = False
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The peak in bytes: the sum of the terms."""
        return sum(self.breakdown.values())

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(self.breakdown, key=lambda term: self.breakdown[term])


class Accountant:
    """Predict the peak of plans for one model, on fake tensors and without a GPU.

    On a GPU, 2 % of the peak are slack, which a run may take but is not planned to.

    The forward and backward passes do not depend on the levels, and the optimizer's workspace does
    not depend on the batch, so each is traced once and cached. With gradient release the workspace
    of each parameter is added to what is alive when that parameter is updated.

    On a GPU, the context and the workspace of cuBLAS are measured values or defaults. What the
    caching allocator reserves beyond the tensors is replayed (see `memory.allocator`): the weights,
    then two steps through all layers, the first of which creates the state. The replay is an upper
    estimate, since an allocator short of memory frees cached segments. It leaves out mixed levels.
    It has not been compared with a GPU yet.

    Args:
        model: The model.
        num_layers: Number of its decoder layers.
        sequence_length: Tokens in a row.
        precision: Lightning's name of the precision.
        on_gpu: Whether the run will be on a GPU, and so needs a context and a margin.
        devices: The devices of the run; the account is of the first, and no other needs more.
        costs: The GPU's context and workspace; by default those of a GPU that was never measured.
    """

    def __init__(
        self,
        model: AccountedModel,
        *,
        num_layers: int,
        sequence_length: int,
        precision: Precision,
        on_gpu: bool,
        devices: Devices = ONE_DEVICE,
        costs: DeviceCosts | None = None,
    ) -> None:
        self._model = model
        self._costs = costs or DeviceCosts()
        self._devices = devices
        self._shapes = {name: devices.shard_shape(shape) for name, shape in model.shapes.items()}
        self._num_layers = num_layers
        self._width = num_layers * int(model.llama_config().hidden_size)
        self._sequence_length = sequence_length
        self._precision = precision
        self._on_gpu = on_gpu
        self._expandable = on_gpu and has_expandable_segments()
        self._passes: dict[MemoryOptions, Step] = {}
        self._workspaces: dict[tuple[tuple[int, ...], int, StateDtype, bool], int] = {}
        self._margin = AllocatorMargin(
            self.replay_allocator, self._state_bytes, self._costs.workspace
        )

    def account(self, plan: FoldPlan) -> Account:
        """Predict the peak of one training step of this plan."""
        terms = {
            **self.tensor_terms(plan),
            "context": self.context,
            "margin": self._margin.bytes_for(plan) if self._on_gpu else 0,
        }
        percent = _SLACK_PERCENT if self._on_gpu else 0
        terms["slack"] = -(-sum(terms.values()) * percent // (100 - percent))  # rounded up
        return Account(terms, self._devices.count, self._expandable, self.host_bytes(plan))

    def host_bytes(self, plan: FoldPlan) -> int:
        """Count the pinned host memory of one device's run, by formula.

        torch rounds each pinned tensor up to a power of two (at::HostBlock in
        aten/src/ATen/core/CachingHostAllocator.h).
        """
        options, sizes = plan.memory_options, list[int]()
        if not self._on_gpu:
            return 0
        for name, shape in self._shapes.items():
            if options.state_offload:
                sizes += _state_sizes(shape, plan.levels.get(name, 0), options.state_dtype)
            if options.grad_offload:
                sizes.append(self._gradient_bytes(shape))
        return sum(1 << max(0, size - 1).bit_length() for size in sizes if size)

    def tensor_terms(self, plan: FoldPlan) -> dict[str, int]:
        """Predict the peak of the bytes in tensors by term, without what the device adds."""
        return self._peak(plan, self._traced_passes(plan.memory_options)).terms

    def list_tensors(self, plan: FoldPlan) -> list[TensorGroup]:
        """List every tensor behind `tensor_terms`, the largest first; their bytes add up to it.

        This takes a trace of its own, which records where tensors come from.
        """
        passes = self._track(plan.memory_options, with_origins=True)
        peak = self._peak(plan, passes)
        update = None
        if peak.updated is not None:
            shape = self._shapes[peak.updated]
            update = self._trace_update(plan, peak.updated, shape, with_origins=True)
        return group_tensors(
            peak,
            passes.timeline,
            update,
            shapes=self._shapes,
            buckets=self._buckets,
            sums_on_device=not self._on_gpu,
            plan=plan,
            dtype=weight_dtype(self._precision),
        )

    def _peak(self, plan: FoldPlan, passes: Step) -> PeakMoment:
        persistent = self._persistent_bytes(plan)
        workspaces = {named[0]: self._update_bytes(plan, *named) for named in self._shapes.items()}
        options = plan.memory_options
        moments: list[PeakMoment] = [PeakMoment({}, passes.peak)]
        released = list(zip(passes.updates, workspaces, strict=bool(passes.updates)))
        if options.updates_in_backward:
            moments += [PeakMoment({}, moment, updated=name) for moment, name in released]
        else:  # parameters are updated one after the other
            largest = max(workspaces, key=lambda name: workspaces[name])
            moments.append(PeakMoment({}, passes.end_of_backward, updated=largest))
            moments += [PeakMoment({}, moment, summed=name) for moment, name in released]
        peaks = []
        for peak in moments:
            terms: dict[str, int] = dict(peak.moment.terms.items()) | persistent
            terms["gradients"] += sum(self._buckets) + self._sum_bytes(options)
            if peak.updated is not None:
                terms["workspace"] += workspaces[peak.updated]
            if peak.summed is not None:
                terms["workspace"] += self._bytes_from_host(options, self._shapes[peak.summed])
            peaks.append(peak._replace(terms=terms))
        return max(peaks, key=lambda peak: sum(peak.terms.values()))

    def fits(self, plan: FoldPlan, budget_bytes: int) -> bool:
        """Whether the peak is within a budget; traces only where the bound does not decide."""
        return (
            self.lower_bound(plan) <= budget_bytes
            and sum(self.tensor_terms(plan).values()) + self.context <= budget_bytes
            and self.account(plan).peak_bytes <= budget_bytes
        )

    def lower_bound(self, plan: FoldPlan) -> int:
        """Count bytes that the peak of a plan is never below, without a trace."""
        persistent, memory_options = self._persistent_bytes(plan), plan.memory_options
        # Whatever is recomputed, the inputs of all layers are alive where backward begins, and
        # gradients, unless they are released, where it ends; from the second micro-batch on, both.
        tokens = memory_options.micro_batch_size * self._sequence_length
        inputs = tokens * self._width * weight_dtype(self._precision).itemsize
        gradients = 0 if memory_options.gradient_release else persistent["weights"]
        accumulates = memory_options.accumulate_grad_batches > 1
        in_passes = inputs + gradients if accumulates else max(inputs, gradients)
        held = sum(persistent.values()) + self._sum_bytes(memory_options)
        return self.context + held + in_passes

    def replay_allocator(self, plan: FoldPlan) -> AllocatorPeaks:
        """Replay the caching allocator over two steps, without the workspace of cuBLAS.

        Args:
            plan: A plan whose layers all have the same levels.
        """
        shapes = self._shapes
        updates = []
        for name, shape in shapes.items():
            kept = _state_sizes(shape, plan.levels.get(name, 0), plan.memory_options.state_dtype)
            state = () if plan.memory_options.state_offload else kept
            from_host = self._bytes_from_host(plan.memory_options, shape)
            workspace = self._update_bytes(plan, name, shape)
            updates.append(ParameterUpdate(state, workspace, from_host))
        weights = list(self._weight_sizes(plan))
        step = self._traced_passes(plan.memory_options).events
        kept_whole = [*weights, *self._buckets, self._sum_bytes(plan.memory_options)]
        return replay(two_steps(kept_whole, step, updates), expandable=self._expandable)

    def state_change(self, plan: FoldPlan, change_bytes: int) -> int:
        """Convert a change of the peak into the change of the state that causes it.

        The margin and the slack grow with the state; the other terms are taken as constant.

        Args:
            plan: The plan before the change.
            change_bytes: The change of the peak in bytes; below 0 it shrinks.

        Returns:
            The change of the state in bytes.
        """
        if not self._on_gpu:
            return change_bytes
        without_slack = change_bytes * (100 - _SLACK_PERCENT) // 100
        if plan.memory_options.state_offload:
            return without_slack
        return self._margin.state_change(plan, without_slack)

    def raise_context(self, context_bytes: int) -> None:
        """Count a CUDA context that has grown since the GPU was measured."""
        context = max(self._costs.context, context_bytes)
        self._costs = replace(self._costs, context=context)

    @property
    def context(self) -> int:
        """Bytes that the process takes outside torch's allocator: the CUDA context and NCCL."""
        if not self._on_gpu:
            return 0
        return self._costs.context + num_communicators(self._devices) * NCCL_BYTES

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients on one device, or of their sums."""
        return sum(map(self._gradient_bytes, self._shapes.values()))

    @cached_property
    def _buckets(self) -> list[int]:
        return bucket_sizes(self._devices, map(self._gradient_bytes, self._shapes.values()))

    def _persistent_bytes(self, plan: FoldPlan) -> dict[str, int]:
        """Count what is alive from the first step to the last."""
        return {
            "weights": sum(self._weight_sizes(plan)),
            "optimizer_state": 0 if plan.memory_options.state_offload else self._state_bytes(plan),
        }

    def _weight_sizes(self, plan: FoldPlan) -> Iterator[int]:
        """Count the bytes of every tensor that stores weights."""
        dtype, stored = weight_dtype(self._precision), plan.memory_options.weights_dtype
        for name, shape in self._shapes.items():
            for kept_shape, kept_dtype in weight_layout(name, shape, dtype, stored):
                yield math.prod(kept_shape) * kept_dtype.itemsize

    def _state_bytes(self, plan: FoldPlan) -> int:
        return optimizer_state_bytes(self._shapes, plan.levels, plan.memory_options.state_dtype)

    def _traced_passes(self, memory_options: MemoryOptions) -> Step:
        # The passes do not depend on how the state is stored.
        memory_options = replace(memory_options, state_dtype="float32", state_offload=False)
        if memory_options not in self._passes:
            self._passes[memory_options] = self._track(memory_options)
        return self._passes[memory_options]

    def _track(self, memory_options: MemoryOptions, *, with_origins: bool = False) -> Step:
        size = (memory_options.micro_batch_size, self._sequence_length)

        def make_batch() -> tuple[Tensor, Tensor]:
            # Two tensors, as the data loader gives them, though the tokens are the same.
            return torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)

        small = _LOGGED_BYTES + (_SCALER_BYTES if self._precision == "16-mixed" else 0)
        with as_first_device(self._devices, self._precision) as join, fake_tensors(self._precision):
            num_traced = min(self._num_layers, 4 if self._devices.shards else 3)
            model = self._model.build_for_trace(memory_options, num_traced)
            join(model)
            return track_step(
                model,
                None,
                make_batch,
                accumulate_grad_batches=memory_options.accumulate_grad_batches,
                gradient_release=memory_options.gradient_release,
                grad_offload=memory_options.grad_offload,
                autocast=autocast_for(self._precision),
                num_layers=self._num_layers,
                held={"logged values": torch.zeros(small, dtype=torch.uint8)},
                with_origins=with_origins,
                as_on_cuda=self._on_gpu,
            )

    def _update_bytes(self, plan: FoldPlan, name: str, shape: tuple[int, ...]) -> int:
        """Count what is on the device during the update of one parameter only."""
        options = plan.memory_options
        stored = (shape, plan.levels.get(name, 0), options.state_dtype)
        key = (*stored, is_int8(name, shape, options.weights_dtype))
        if key not in self._workspaces:
            update = self._trace_update(plan, name, shape)
            self._workspaces[key] = update.peak().terms["workspace"]
        state = sum(_state_sizes(*stored)) if options.state_offload else 0
        return self._workspaces[key] + state + self._bytes_from_host(options, shape)

    def _gradient_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * weight_dtype(self._precision).itemsize

    def _bytes_from_host(self, memory_options: MemoryOptions, shape: tuple[int, ...]) -> int:
        """Count the copy of a parameter's sum of gradients while the device adds or updates."""
        is_copied = memory_options.grad_offload and self._on_gpu
        return self._gradient_bytes(shape) if is_copied else 0

    def _sum_bytes(self, memory_options: MemoryOptions) -> int:
        """Count what the device holds for sums of gradients throughout: their norms in float32.

        On a CPU also the sums, since host memory is the device's.
        """
        if not memory_options.grad_offload:
            return 0
        sums = 0 if self._on_gpu else self.gradient_bytes
        return sums + torch.float32.itemsize * len(self._shapes)

    def _trace_update(
        self, plan: FoldPlan, name: str, shape: tuple[int, ...], *, with_origins: bool = False
    ) -> Timeline:
        # Which kernel runs depends on the device of the tensors, and the optimizer takes the meta
        # device for a GPU. State from host memory is counted apart.
        dtype, device = weight_dtype(self._precision), "meta" if self._on_gpu else "cpu"
        alone = replace(
            plan,
            levels={name: plan.levels[name]} if name in plan.levels else {},
            memory_options=replace(plan.memory_options, state_offload=False),
        )
        with nullcontext() if self._on_gpu else fake_tensors(self._precision):
            weight = torch.empty(shape, dtype=dtype, device=device)
            parameter = torch.nn.Parameter(weight)
            if is_int8(name, shape, plan.memory_options.weights_dtype):
                parameter = torch.nn.Parameter(Int8Weight(*quantize(weight.float()), dtype))
            parameter.grad = torch.empty_like(weight)
            optimizer = self._model.make_optimizer([(name, parameter)], alone)
            return track_optimizer_step(optimizer, name=name if with_origins else None)


def optimizer_state_bytes(
    shapes: Mapping[str, tuple[int, ...]], levels: Mapping[str, int], dtype: StateDtype
) -> int:
    """Count the bytes of optimizer state that all parameters together need, by formula.

    Args:
        shapes: Shape of every parameter by name, in elements.
        levels: Fold level by name; a parameter without one is not folded.
        dtype: The dtype of the moments.
    """
    return sum(
        sum(_state_sizes(shape, levels.get(name, 0), dtype)) for name, shape in shapes.items()
    )


@cache
def _state_sizes(shape: tuple[int, ...], level: int, dtype: StateDtype) -> tuple[int, ...]:
    """Count the bytes of every tensor of the state of one parameter."""
    return tuple(kept.nbytes for kept in state_layout(shape, level, getattr(torch, dtype)).values())
