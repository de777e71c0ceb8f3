"""One training step traced tensor by tensor: on fake tensors to predict, on real ones to measure.

The same tracker serves both, so that prediction and measurement count the same: every tensor
storage that an operator returns, until its last reference is gone. What an operator allocates
inside itself is not seen, but counted by formula where it matters (see `memory.cuda_operators`).
What a GPU's allocator adds by rounding and caching is the account's margin.

Uses a private part of torch, checked on torch 2.11 and 2.13: `FakeTensorMode`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Protocol, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from foam_lightning.errors import ConfigError
from foam_lightning.memory.allocator import END_OF_BACKWARD, Events
from foam_lightning.memory.timeline import Moment, Repeat, Term, Timeline
from foam_lightning.memory.tracker import StorageTracker, qualified, record_modules
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.gradient_offload import HostGradients
from foam_lightning.optim.gradient_release import release_gradients
from foam_lightning.settings import Precision


class Traceable(Protocol):
    """What the trace needs of a model: its two halves, its layers and its tensors."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield every trained tensor."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield every trained tensor with its name."""
        ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every other tensor that is kept, with its name."""
        ...

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield every module with its name."""
        ...

    def layers(self) -> Sequence[torch.nn.Module]:
        """List the decoder layers, first to last."""
        ...

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Run the decoder: (B, S) token ids to (B, S, H) hidden states."""
        ...

    def mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Run the head and the cross entropy, to a scalar."""
        ...


@dataclass(frozen=True)
class Step:
    """What was alive during one optimizer step.

    Attributes:
        peak: The moment with the most bytes.
        updates: With gradient release, the moment at which the update of each parameter begins, or
            with `grad_offload` its addition to the sum, in the order of the module's parameters at
            full depth: its gradient is alive, the workspace is not yet. Empty otherwise.
        end_of_backward: The moment before the update of all parameters.
        timeline: Every allocation and free at full depth.
    """

    peak: Moment
    updates: Sequence[Moment]
    end_of_backward: Moment
    timeline: Timeline

    @cached_property
    def events(self) -> Events:
        """Every allocation and free, for a replay of the allocator."""
        return self.timeline.events()


def track_step(
    module: Traceable,
    optimizer: FOAM | None,
    make_batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    accumulate_grad_batches: int = 1,
    gradient_release: bool = False,
    grad_offload: bool = False,
    autocast: AbstractContextManager[object] | None = None,
    num_layers: int | None = None,
    held: Mapping[str, Tensor] | None = None,
    with_origins: bool = False,
    as_on_cuda: bool = False,
) -> Step:
    """Run one optimizer step as the training loop does, and track its tensors.

    The order is Lightning's, with gradients freed after the step: micro-batches forward and
    backward, step, free. From the second micro-batch on nothing changes, so two stand for all.

    Args:
        module: The model, with real or fake tensors.
        optimizer: The optimizer of the module's parameters; None leaves every update out.
        make_batch: Returns input ids and labels, both (B, S).
        accumulate_grad_batches: Micro-batches per step.
        gradient_release: Update and free inside backward.
        grad_offload: With both, free inside backward and update at the end, from sums that count as
            "gradients". The account leaves the optimizer out, and counts them itself.
        autocast: The context of a mixed-precision forward pass.
        num_layers: The depth to report. Where it is more than the module has, the second of its
            layers, at least three, stands for those missing, and in backward the last but one:
            decoder layers are alike, so this is exact and takes the time of three layers. With
            FSDP2 it takes four, as backward gathers the weights of a layer during the one before.
            The weights are those of the module.
        held: Other tensors that are alive throughout, by name; they count as "workspace".
        with_origins: Record where every storage comes from.
        as_on_cuda: Also count what operators would allocate inside themselves on a CUDA device.
    """
    tracker = StorageTracker(with_origins=with_origins, as_on_cuda=as_on_cuda)
    names, parameters = _named(module.named_parameters())
    tracker.claim(parameters, "weights")
    tracker.name(zip(names, parameters, strict=True))
    buffer_names, buffers = _named([*module.named_buffers(), *(held or {}).items()])
    tracker.claim(buffers, "workspace")
    tracker.name(zip(buffer_names, buffers, strict=True))
    num_seen = len(module.layers())
    times = (num_layers or num_seen) - num_seen + 1
    repeats = []
    sums = HostGradients(parameters) if grad_offload and optimizer is not None else None
    tracker.claim(sums.tensors() if sums is not None else (), "gradients")
    with ExitStack() as watched:
        watched.enter_context(tracker)
        if with_origins:
            watched.enter_context(record_modules(tracker, module.named_modules()))
        if gradient_release:
            if sums is not None:
                use: Callable[[], AbstractContextManager[object]] = sums.collect
            else:
                use = nullcontext if optimizer is None else partial(release_gradients, optimizer)
            watched.enter_context(_mark_updates(tracker, names, parameters, use))
        for micro_batch in range(min(accumulate_grad_batches, 2)):
            with _mark_layers(tracker, module, f"{micro_batch}"):
                batch = None  # the last one is freed here, as in Lightning's loop
                batch = _run_micro_batch(
                    tracker, module, make_batch, accumulate_grad_batches, autocast
                )
            tracker.mark(f"{END_OF_BACKWARD} {micro_batch}")
            tracker.claim((p.grad for p in parameters), "gradients")
            tracker.name((name, p.grad) for name, p in zip(names, parameters, strict=True))
            if times > 1:
                forward, backward = f"{micro_batch} forward", f"{micro_batch} backward"
                repeats += [
                    Repeat(f"{forward} 1", f"{forward} 2", times),
                    Repeat(f"{backward} {num_seen - 2}", f"{backward} {num_seen - 3}", times),
                ]
        if optimizer is not None:
            tracker.term, tracker.phase, tracker.made_by = "workspace", "update", "optimizer"
            optimizer.step()
            if sums is not None:
                sums.update(optimizer)
            tracker.claim(_state_tensors(optimizer), "optimizer_state")
            optimizer.zero_grad(set_to_none=True)
        del batch
    timeline = tracker.timeline(repeats)
    marked = range(len(parameters)) if gradient_release else ()
    updates = _at_full_depth(timeline.at(f"update {index}") for index in marked)
    (end,) = timeline.at(f"{END_OF_BACKWARD} {micro_batch}")
    return Step(timeline.peak(), updates, end, timeline)


def track_optimizer_step(optimizer: torch.optim.Optimizer, *, name: str | None = None) -> Timeline:
    """Run one step of the optimizer and track its temporaries, which count as "workspace".

    Args:
        optimizer: Its parameters have gradients; its state may be created in this step.
        name: Record the origin of every storage under this name.
    """
    tracker = StorageTracker(with_origins=name is not None)
    tracker.phase, tracker.made_by = "update", name or ""
    for group in optimizer.param_groups:
        tracker.claim(group["params"], "weights")
        tracker.claim((p.grad for p in group["params"]), "weights")
    tracker.term = "workspace"
    with tracker:
        optimizer.step()
    tracker.claim(_state_tensors(optimizer), "optimizer_state")
    return tracker.timeline()


@contextmanager
def fake_tensors(precision: Precision) -> Iterator[None]:
    """Create only fake tensors, shapes without memory, in the dtype that a precision trains in.

    The fake device is the CPU: fake CUDA tensors abort a torch built without CUDA, and the
    fused attention of both devices saves the same tensors.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight_dtype(precision))
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the weights under a precision.

    Raises:
        ConfigError: The account does not support the precision.
    """
    if precision not in get_args(Precision):
        raise ConfigError(
            f"trainer.precision {precision!r} is not supported; "
            f"use {', '.join(get_args(Precision))}"
        )
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of matrix products under a mixed precision; None under any other.

    Args:
        precision: Lightning's name of the precision.
    """
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def autocast_for(precision: Precision, device: str = "cpu") -> AbstractContextManager[object]:
    """Return the forward context of a precision.

    Args:
        precision: Lightning's name of the precision.
        device: The type of the device; the trace runs on the CPU.
    """
    if (dtype := autocast_dtype(precision)) is None:
        return nullcontext()
    # As Lightning has it: without the cache, which would keep a copy of every weight.
    return torch.autocast(device, dtype=dtype, cache_enabled=False)


@contextmanager
def _mark_layers(tracker: StorageTracker, module: Traceable, prefix: str) -> Iterator[None]:
    """Mark where each layer begins, forward and backward."""

    def before(index: int) -> Callable[..., None]:
        return lambda *_: tracker.mark(f"{prefix} forward {index}")

    def after(index: int) -> Callable[..., None]:
        def watch(_module: object, _inputs: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(arrive)

        def arrive(_gradient: Tensor) -> None:
            tracker.mark(f"{prefix} backward {index}")
            tracker.made_by = names.get(layers[index], "")

        return watch

    handles = []
    layers = list(module.layers())
    names = {part: qualified(name) for name, part in module.named_modules()}
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before(index)))
        handles.append(layer.register_forward_hook(after(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _mark_updates(
    tracker: StorageTracker,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    use_gradients: Callable[[], AbstractContextManager[object]],
) -> Iterator[None]:
    """Release gradients; mark the start of each use, and count its memory as "workspace"."""
    before: list[tuple[Term, str, str]] = []

    def begin(index: int, param: Tensor) -> None:
        tracker.claim([param.grad], "gradients")
        tracker.name([(names[index], param.grad)])
        tracker.mark(f"update {index}")
        before.append((tracker.term, tracker.phase, tracker.made_by))
        tracker.term, tracker.phase, tracker.made_by = "workspace", "update", names[index]

    def end(param: Tensor) -> None:
        param.grad = None
        tracker.term, tracker.phase, tracker.made_by = before.pop()

    with ExitStack() as hooks:  # they run in the order in which they are registered
        for index, param in enumerate(parameters):
            hooks.enter_context(param.register_post_accumulate_grad_hook(partial(begin, index)))
        hooks.enter_context(use_gradients())
        for param in parameters:
            hooks.enter_context(param.register_post_accumulate_grad_hook(end))
        yield


def _at_full_depth(updates: Iterable[Sequence[Moment]]) -> list[Moment]:
    """Put updates in the order of the parameters, where those of one layer happen repeatedly."""
    ordered: list[Moment] = []
    for times, alike in groupby(updates, key=len):
        layer = list(alike)
        # Backward reaches the last layer first.
        for time in reversed(range(times)):
            ordered += [update[time] for update in layer]
    return ordered


def _run_micro_batch(
    tracker: StorageTracker,
    module: Traceable,
    make_batch: Callable[[], tuple[Tensor, Tensor]],
    accumulate_grad_batches: int,
    autocast: AbstractContextManager[object] | None,
) -> tuple[Tensor, Tensor]:
    def enter_backward(_: Tensor) -> None:
        tracker.term, tracker.made_by = "activations", "decoder"

    tracker.term, tracker.phase, tracker.made_by = "activations", "forward", "batch"
    with autocast or nullcontext():
        input_ids, labels = make_batch()
        hidden = module.hidden_states(input_ids)
        # Runs when the gradient leaves the head: what follows is the backward of the decoder.
        hidden.register_hook(enter_backward)
        tracker.term, tracker.made_by = "loss", "loss"
        loss = module.mean_loss(hidden, labels) / accumulate_grad_batches
    del hidden
    tracker.phase = "backward"
    loss.backward()
    return input_ids, labels


def _named(tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[Tensor]]:
    names, found = [], []
    for name, tensor in tensors:
        names.append(qualified(name))
        found.append(tensor)
    return names, found


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
