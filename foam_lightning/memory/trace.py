"""One training step watched storage by storage: on fake tensors to predict, on real to measure.

The same tracker serves both, so that prediction and measurement cannot differ in what they count:
every tensor storage that an operator returns, from its birth until its last reference dies. What
happens inside one operator (a workspace of its own) is not seen, nor is what the device's
allocator adds by rounding and caching; on a GPU the account's margin stands for those.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from foam_lightning.errors import ConfigError

Precision = Literal["32-true", "bf16-true", "bf16-mixed"]
Term = Literal["weights", "gradients", "optimizer_state", "activations", "loss", "workspace"]
TERMS: tuple[Term, ...] = get_args(Term)
# What lives from the first step to the last counts as if it had been there from the start.
_STANDING = (TERMS.index("weights"), TERMS.index("optimizer_state"))


class Traceable(Protocol):
    """What the trace needs of a model: its two halves, its layers and its tensors."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield every trained tensor."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept but not trained."""
        ...

    def layers(self) -> Sequence[torch.nn.Module]:
        """List the decoder layers, first to last."""
        ...

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Run the decoder: (B, S) token ids to (B, S, H) hidden states."""
        ...

    def mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Run head and cross entropy: to a scalar."""
        ...


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes were alive.

    Attributes:
        terms: Bytes alive at that moment, by term.
    """

    terms: Mapping[Term, int]

    @property
    def total_bytes(self) -> int:
        """All bytes alive at the peak."""
        return sum(self.terms.values())


class Repeat(NamedTuple):
    """A stretch of the record, between two marks, that happens more often than it was seen."""

    start: str
    stop: str
    times: int


class StorageTracker(TorchDispatchMode):
    """Record the birth and death of every tensor storage while active.

    A storage born now belongs to `term`, the phase the step is in, unless `claim` says otherwise,
    before or after.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.term: Term = "activations"
        self._terms: list[int] = []  # of each storage ever seen, in order of birth
        self._bytes: list[int] = []
        self._changes: list[int] = []  # n: storage n is born; ~n: it dies
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address
        self._marks: dict[str, int] = {}

    def claim(self, tensors: Iterable[Tensor | None], term: Term) -> None:
        """Say what these tensors are, such as gradients; None entries are skipped."""
        for tensor in tensors:
            if tensor is not None:
                self._terms[self._index(tensor)] = TERMS.index(term)

    def mark(self, name: str) -> None:
        """Name this moment; a name that was given before keeps its first moment."""
        self._marks.setdefault(name, len(self._changes))

    def peak(self, repeats: Sequence[Repeat] = ()) -> Peak:
        """Find the peak so far.

        Weights and optimizer state count as if they had been there from the start: the peak is
        that of any later step.

        Args:
            repeats: Stretches to count `times` over, in order of time and apart from each other.
        """
        births = np.array(self._changes, dtype=np.int64)
        index = np.where(births >= 0, births, ~births)
        terms, sizes = np.array(self._terms)[index], np.array(self._bytes)[index]
        deltas = np.zeros((len(births), len(TERMS)), dtype=np.int64)
        deltas[np.arange(len(births)), terms] = np.where(births >= 0, sizes, -sizes)
        standing = np.zeros(len(TERMS), dtype=np.int64)
        for term in _STANDING:
            standing[term] = deltas[births >= 0, term].sum()
            deltas[:, term] = 0
        pieces, done = [], 0
        for repeat in repeats:
            start, stop = self._marks[repeat.start], self._marks[repeat.stop]
            pieces += [deltas[done:start], np.tile(deltas[start:stop], (repeat.times, 1))]
            done = stop
        alive = np.cumsum(np.concatenate([*pieces, deltas[done:]]), axis=0) + standing
        highest = alive[alive.sum(axis=1).argmax()]
        return Peak({term: int(size) for term, size in zip(TERMS, highest, strict=True)})

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._index(leaf)
        return result

    def _index(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None:
            return known[0]
        index = len(self._terms)
        self._terms.append(TERMS.index(self.term))
        self._bytes.append(storage.nbytes())
        self._changes.append(index)

        def bury(_: object) -> None:
            del self._alive[address]
            self._changes.append(~index)

        self._alive[address] = (index, weakref.ref(storage, bury))
        return index


def track_step(
    module: Traceable,
    optimizer: torch.optim.Optimizer | None,
    make_batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    accumulate_grad_batches: int = 1,
    autocast: AbstractContextManager[object] | None = None,
    num_layers: int | None = None,
) -> Peak:
    """Run one optimizer step as the training loop runs it, and return its peak.

    The order is Lightning's, with gradients freed after the step: micro-batches forward and
    backward, step, free. From the second micro-batch on nothing changes, so two stand for all.

    Args:
        module: The model, its tensors real or fake.
        optimizer: Made for the module's parameters; None leaves the step out.
        make_batch: Gives input ids and labels, both (B, S).
        accumulate_grad_batches: Micro-batches per step.
        autocast: The context of a mixed-precision forward pass.
        num_layers: The depth to give the peak for. Where it is more than the module has, the
            second of its layers, at least three, stands for those missing: decoder layers are
            alike, so this is exact and costs three layers of time. The weights are those of the
            module.
    """
    tracker = StorageTracker()
    parameters = list(module.parameters())
    tracker.claim(parameters, "weights")
    tracker.claim(module.buffers(), "workspace")
    num_seen = len(module.layers())
    times = (num_layers or num_seen) - num_seen + 1
    repeats = []
    with tracker:
        for micro_batch in range(min(accumulate_grad_batches, 2)):
            with _layers_marked(tracker, module, f"{micro_batch}"):
                _run_micro_batch(tracker, module, make_batch, accumulate_grad_batches, autocast)
            tracker.claim((p.grad for p in parameters), "gradients")
            repeats += [
                Repeat(f"{micro_batch} forward 1", f"{micro_batch} forward 2", times),
                Repeat(f"{micro_batch} backward 1", f"{micro_batch} backward 0", times),
            ]
        if optimizer is not None:
            tracker.term = "workspace"
            optimizer.step()
            tracker.claim(_state_tensors(optimizer), "optimizer_state")
            optimizer.zero_grad(set_to_none=True)
    return tracker.peak(repeats if times > 1 else ())


def track_optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """Run the optimizer on its parameters' gradients and return its workspace at most, in bytes."""
    tracker = StorageTracker()
    for group in optimizer.param_groups:
        tracker.claim(group["params"], "weights")
        tracker.claim((p.grad for p in group["params"]), "weights")
    tracker.term = "workspace"
    with tracker:
        optimizer.step()
    tracker.claim(_state_tensors(optimizer), "optimizer_state")
    return tracker.peak().terms["workspace"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Add up the bytes of every state tensor that the optimizer holds."""
    return sum(tensor.nbytes for tensor in _state_tensors(optimizer))


@contextmanager
def fake_tensors(precision: Precision) -> Iterator[None]:
    """Make every tensor fake, shapes without memory, in the dtype that a precision trains in.

    The fake device is the CPU: fake CUDA tensors abort a torch built without CUDA, and the
    fused attention of both devices keeps the same tensors.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight_dtype(precision))
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Tell the dtype of the weights under a precision.

    Raises:
        ConfigError: The precision is not one that the account knows.
    """
    if precision not in get_args(Precision):
        raise ConfigError(
            f"trainer.precision {precision!r} is not supported; "
            f"use {', '.join(get_args(Precision))}"
        )
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def autocast_for(precision: Precision) -> AbstractContextManager[object]:
    """Give the forward context of a precision, on the CPU where the trace runs."""
    if precision == "bf16-mixed":
        # As Lightning has it: without the cache, which would keep a copy of every weight.
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


@contextmanager
def _layers_marked(tracker: StorageTracker, module: Traceable, prefix: str) -> Iterator[None]:
    """Mark where each layer begins, forward and backward."""

    def before(index: int) -> Callable[..., None]:
        return lambda *_: tracker.mark(f"{prefix} forward {index}")

    def after(index: int) -> Callable[..., None]:
        def watch(_module: object, _inputs: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda _: tracker.mark(f"{prefix} backward {index}"))

        return watch

    handles = []
    for index, layer in enumerate(module.layers()):
        handles.append(layer.register_forward_pre_hook(before(index)))
        handles.append(layer.register_forward_hook(after(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_micro_batch(
    tracker: StorageTracker,
    module: Traceable,
    make_batch: Callable[[], tuple[Tensor, Tensor]],
    accumulate_grad_batches: int,
    autocast: AbstractContextManager[object] | None,
) -> None:
    def enter_backward(_: Tensor) -> None:
        tracker.term = "activations"

    tracker.term = "activations"
    with autocast or nullcontext():
        input_ids, labels = make_batch()
        hidden = module.hidden_states(input_ids)
        # Fires when the gradient leaves the head: what follows is the decoder's backward.
        hidden.register_hook(enter_backward)
        tracker.term = "loss"
        loss = module.mean_loss(hidden, labels) / accumulate_grad_batches
    del hidden
    loss.backward()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
