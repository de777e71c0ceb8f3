"""Every tensor storage of a run, from its birth to its death, while it runs."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from typing_extensions import override

from foam_lightning.memory.timeline import TERMS, Moment, Origin, Record, Repeat, Term, Timeline


class StorageTracker(TorchDispatchMode):
    """Record the birth and death of every tensor storage while active.

    A storage born now belongs to `term`, the phase the step is in, unless `claim` says otherwise,
    before or after. Of a sharded tensor the shard that this process has counts. A storage that is
    emptied dies and one that is filled again is born: so FSDP2 gathers weights, which belong to
    "workspace".

    Args:
        noted: Keep the origin of each: the `place` and the `phase` that the run is in at its birth.
    """

    def __init__(self, *, noted: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.term: Term = "activations"
        self.place = self.phase = ""
        self.record = Record()
        self._noted = noted
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address
        self._is_over = False

    def claim(self, tensors: Iterable[Tensor | None], term: Term) -> None:
        """Say what these tensors are, such as gradients; None entries are skipped."""
        for tensor in tensors:
            if tensor is not None:
                self.record.terms[self._index(tensor)] = TERMS.index(term)

    def name(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """Say which parameters these tensors belong to, where origins are noted; as `claim`."""
        for name, tensor in tensors:
            if tensor is not None and self._noted:
                index = self._index(tensor)
                self.record.origins[index] = self.record.origins[index]._replace(made_by=name)

    def mark(self, name: str) -> None:
        """Name this moment; a name that was given before keeps its first moment."""
        self.record.marks.setdefault(name, len(self.record.changes))

    def peak(self) -> Moment:
        """Find the moment at which most bytes were alive."""
        return self.timeline().peak()

    def timeline(self, repeats: Sequence[Repeat] = ()) -> Timeline:
        """Look at what was seen so far.

        Args:
            repeats: Stretches to count `times` over, in order of time and apart from each other.
        """
        return Timeline(self.record, repeats)

    @override
    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        # No operator, so that the mode does not see it.
        resize = self._resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            self._resized(storage, size)
            return resized

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        return self

    @override
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        # What dies from now on, such as the model itself, is not of this run.
        self._is_over = True

    @override
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
        local = _local(tensor)
        storage = local.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None:
            return known[0]
        shape = tuple(local.shape)
        origin = Origin(self.place, self.phase, shape, local.dtype) if self._noted else None
        index = self._bear(storage.nbytes(), self.term, origin)

        def free(_: object) -> None:
            last, _reference = self._alive.pop(address)
            if not self._is_over:
                self.record.changes.append(~last)

        self._alive[address] = (index, weakref.ref(storage, free))
        return index

    def _bear(self, size: int, term: Term, origin: Origin | None) -> int:
        record = self.record
        index = len(record.terms)
        record.terms.append(TERMS.index(term))
        record.sizes.append(size)
        record.changes.append(index)
        if origin is not None:
            record.origins.append(origin)
        return index

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        known = self._alive.get(storage._cdata)
        if known is not None:
            index, reference = known
            record = self.record
            record.terms[index] = TERMS.index("workspace")
            record.changes.append(~index)
            origin = record.origins[index] if record.origins else None
            self._alive[storage._cdata] = (self._bear(size, "workspace", origin), reference)


def _local(tensor: Tensor) -> Tensor:
    """Give the shard of a sharded tensor, any other as it is."""
    inner: Any = tensor
    while is_traceable_wrapper_subclass(inner):
        names, _ = inner.__tensor_flatten__()
        inner = getattr(inner, names[0])
    return cast(Tensor, inner)


_WRAPPER = "model."


def qualified(name: str) -> str:
    """Name a part of a LightningModule as its parameters are named without the module around."""
    return name.removeprefix(_WRAPPER)


@contextmanager
def modules_noted(
    tracker: StorageTracker, modules: Iterable[tuple[str, nn.Module]]
) -> Iterator[None]:
    """Tell the tracker which module runs.

    A forward pass in the middle of backward is one that is recomputed.

    Args:
        tracker: Its `place` and `phase` change.
        modules: By name; of others it is not told.
    """
    names = {module: qualified(name) for name, module in modules}
    before: list[tuple[str, str]] = []

    def enter(module: nn.Module, *_: object) -> None:
        if module in names:
            before.append((tracker.place, tracker.phase))
            phase = "recompute" if tracker.phase == "backward" else tracker.phase
            tracker.place, tracker.phase = names[module], phase

    def leave(module: nn.Module, *_: object) -> None:
        if module in names:
            tracker.place, tracker.phase = before.pop()

    with ExitStack() as hooks:
        hooks.enter_context(register_module_forward_pre_hook(enter))
        # Recomputation ends as soon as it has what it needs, by an exception.
        hooks.enter_context(register_module_forward_hook(leave, always_call=True))
        yield
