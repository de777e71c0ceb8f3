"""Track every tensor storage of a run, from its allocation until it is freed.

Two private parts of torch are used, checked on torch 2.11 and 2.13: the address of a storage,
`UntypedStorage._cdata`, and a patch of `UntypedStorage.resize_`, through which FSDP2 frees and
gathers weights, and which a dispatch mode does not see.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from typing_extensions import override

from foam_lightning.memory.cuda_operators import bytes_inside
from foam_lightning.memory.timeline import TERMS, Moment, Origin, Record, Repeat, Term, Timeline


class StorageTracker(TorchDispatchMode):
    """Record the allocation and the free of every tensor storage while active.

    A new storage counts as the current `term`, unless `claim` assigns it another one, before or
    after. Of a sharded tensor, the shard of this process counts. A storage that is resized is freed
    and allocated anew, as "workspace": so FSDP2 gathers weights.

    Args:
        with_origins: Record where each comes from: the current `made_by` and `phase`.
        as_on_cuda: Also record, as "workspace", what operators would allocate inside themselves on
            a CUDA device.
    """

    def __init__(self, *, with_origins: bool = False, as_on_cuda: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.term: Term = "activations"
        self.made_by = self.phase = ""
        self.record = Record()
        self._with_origins = with_origins
        self._as_on_cuda = as_on_cuda
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address
        self._is_over = False

    def claim(self, tensors: Iterable[Tensor | None], term: Term) -> None:
        """Assign tensors to a term, such as gradients; None entries are skipped."""
        for tensor in tensors:
            if tensor is not None:
                for part in _parts(tensor):
                    self.record.terms[self._index(part)] = TERMS.index(term)

    def name(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """Record as origin the names of parameters; None entries are skipped."""
        for name, tensor in tensors:
            if tensor is not None and self._with_origins:
                for index in map(self._index, _parts(tensor)):
                    self.record.origins[index] = self.record.origins[index]._replace(made_by=name)

    def mark(self, name: str) -> None:
        """Name this moment; a name that is used again keeps its first moment."""
        self.record.marks.setdefault(name, len(self.record.changes))

    def peak(self) -> Moment:
        """Find the moment at which most bytes were alive."""
        return self.timeline().peak()

    def timeline(self, repeats: Sequence[Repeat] = ()) -> Timeline:
        """Return what was recorded so far.

        Args:
            repeats: Stretches to count several times, in order of time and not overlapping.
        """
        return Timeline(self.record, repeats)

    @override
    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_and_record(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            self._record_resize(storage, size)
            return resized

        torch.UntypedStorage.resize_ = resize_and_record  # type: ignore[method-assign, assignment]
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
        # What is freed from now on, such as the model itself, is not part of this run.
        self._is_over = True

    @override
    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and record the storages that it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                for part in _parts(leaf):
                    self._index(part)
        if self._as_on_cuda and (size := bytes_inside(func, args)):
            shape, dtype = (size,), torch.uint8
            origin = Origin(self.made_by, self.phase, shape, dtype) if self._with_origins else None
            index = self._record_allocation(size, "workspace", origin)
            self.record.changes.append(~index)
        return result

    def _index(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if (found := self._alive.get(address)) is not None:
            return found[0]
        shape = tuple(tensor.shape)
        origin = (
            Origin(self.made_by, self.phase, shape, tensor.dtype) if self._with_origins else None
        )
        index = self._record_allocation(storage.nbytes(), self.term, origin)

        def free(_: object) -> None:
            last, _reference = self._alive.pop(address)
            if not self._is_over:
                self.record.changes.append(~last)

        self._alive[address] = (index, weakref.ref(storage, free))
        return index

    def _record_allocation(self, size: int, term: Term, origin: Origin | None) -> int:
        record = self.record
        index = len(record.terms)
        record.terms.append(TERMS.index(term))
        record.sizes.append(size)
        record.changes.append(index)
        if origin is not None:
            record.origins.append(origin)
        return index

    def _record_resize(self, storage: torch.UntypedStorage, size: int) -> None:
        found = self._alive.get(storage._cdata)
        if found is not None:
            index, reference = found
            record = self.record
            record.terms[index] = TERMS.index("workspace")
            record.changes.append(~index)
            origin = record.origins[index] if record.origins else None
            self._alive[storage._cdata] = (
                self._record_allocation(size, "workspace", origin),
                reference,
            )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that store another: a shard, codes and scales, or most often itself."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        names, _ = wrapper.__tensor_flatten__()
        inner = [getattr(wrapper, name) for name in names]  # of a DTensor, its mesh too
        for part in inner:
            if isinstance(part, Tensor):
                yield from _parts(part)
    else:
        yield tensor


_WRAPPER = "model."


def qualified(name: str) -> str:
    """Name a part of a LightningModule as the model inside it does."""
    return name.removeprefix(_WRAPPER)


@contextmanager
def record_modules(
    tracker: StorageTracker, modules: Iterable[tuple[str, nn.Module]]
) -> Iterator[None]:
    """Keep the tracker's `made_by` at the module that runs.

    A forward pass in the middle of backward is a recomputation.

    Args:
        tracker: Its `made_by` and `phase` change.
        modules: The modules to record, with their names.
    """
    names = {module: qualified(name) for name, module in modules}
    before: list[tuple[str, str]] = []

    def enter(module: nn.Module, *_: object) -> None:
        if module in names:
            before.append((tracker.made_by, tracker.phase))
            phase = "recompute" if tracker.phase == "backward" else tracker.phase
            tracker.made_by, tracker.phase = names[module], phase

    def leave(module: nn.Module, *_: object) -> None:
        if module in names:
            tracker.made_by, tracker.phase = before.pop()

    with ExitStack() as hooks:
        hooks.enter_context(register_module_forward_pre_hook(enter))
        # Recomputation ends with an exception as soon as it has what it needs.
        hooks.enter_context(register_module_forward_hook(leave, always_call=True))
        yield
