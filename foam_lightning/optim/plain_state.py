"""Optimizer state of third-party libraries as plain tensors: saved, loaded and counted.

Uses a private part of torch, checked on torch 2.11 and 2.13: the address of a storage,
`UntypedStorage._cdata`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

StateDict = dict[str, Any]
_TENSOR, _OBJECT = "plain_tensor", "plain_object"  # keys in checkpoints


class PlainState(Optimizer):
    """Mixin that makes the `state_dict` of a library's optimizer hold only plain tensors.

    A checkpoint then loads with `weights_only=True` and without the library that wrote it. The
    state may hold tensors made of others (quantised ones) and, with `new_object`, objects whose
    attributes are tensors and simple values. List it before the library's class.

    Attributes:
        new_object: Creates an empty one of these objects.
    """

    new_object: ClassVar[Callable[[], Any] | None] = None

    @override
    def state_dict(self) -> StateDict:
        """Return the state as plain tensors."""
        return _map_state(super().state_dict(), lambda _, value: _to_plain(value))

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state.

        Args:
            state_dict: From `state_dict()`.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        devices = {index: param.device for index, param in zip(saved, params, strict=False)}

        def restore(index: Any, value: Any) -> Any:
            return _from_plain(value, devices.get(index), type(self).new_object)

        super().load_state_dict(_map_state(state_dict, restore))


def measure_state_bytes(optimizer: Optimizer) -> int:
    """Sum the bytes of the state's storages, each once: a view keeps its whole storage alive."""
    storages = [tensor.untyped_storage() for tensor in state_tensors(optimizer)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List all plain tensors of the state, also those in containers, objects and other tensors."""
    return [tensor for state in optimizer.state.values() for tensor in _tensors_in(state)]


def _map_state(state_dict: StateDict, function: Callable[[Any, Any], Any]) -> StateDict:
    state = {
        index: {key: function(index, value) for key, value in entries.items()}
        for index, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _to_plain(value: Any) -> Any:
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return {_TENSOR: {name: getattr(value, name) for name in names}, "context": context}
    if hasattr(value, "__dict__") and not isinstance(value, Tensor):
        return {_OBJECT: dict(vars(value))}
    return value


def _from_plain(
    value: Any, device: torch.device | None, new_object: Callable[[], Any] | None
) -> Any:
    if not isinstance(value, Mapping):
        return value
    if _TENSOR in value:
        from torchao.optim.subclass_8bit import OptimState8bit

        tensors = {name: tensor.to(device) for name, tensor in value[_TENSOR].items()}
        return OptimState8bit.__tensor_unflatten__(tensors, value["context"])
    if _OBJECT in value and new_object is not None:
        restored = new_object()
        for name, entry in value[_OBJECT].items():
            setattr(restored, name, entry.to(device) if isinstance(entry, Tensor) else entry)
        return restored
    return value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors_in(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors_in(entry)
    elif hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value))
