"""Optimizer state that checkpoints hold as plain tensors, whatever a library keeps it in."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

StateDict = dict[str, Any]
_TENSOR, _OBJECT = "plain_tensor", "plain_object"


class PlainState(Optimizer):
    """An optimizer whose `state_dict` holds plain tensors; goes before a library's class.

    A checkpoint is then read without the library that wrote it, and with `weights_only=True`. The
    state may hold tensors made of others (quantised ones) and, with `new_object`, objects whose
    attributes are tensors and simple values.

    Attributes:
        new_object: Makes an empty one of these objects.
    """

    new_object: ClassVar[Callable[[], Any] | None] = None

    @override
    def state_dict(self) -> StateDict:
        """Give the state in plain tensors."""
        return _mapped(super().state_dict(), lambda _, value: _to_plain(value))

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take the state back.

        Args:
            state_dict: From `state_dict()`.
        """
        ours = [param for group in self.param_groups for param in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        devices = {index: param.device for index, param in zip(saved, ours, strict=False)}

        def revive(index: Any, value: Any) -> Any:
            return _revived(value, devices.get(index), type(self).new_object)

        super().load_state_dict(_mapped(state_dict, revive))


def state_bytes(optimizer: Optimizer) -> int:
    """Add up the storages of the state, each once: a view keeps alive all of what it views."""
    storages = [tensor.untyped_storage() for tensor in state_tensors(optimizer)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List every plain tensor of the state: in containers, in objects, inside other tensors."""
    return [tensor for state in optimizer.state.values() for tensor in _tensors_in(state)]


def _mapped(content: StateDict, change: Callable[[Any, Any], Any]) -> StateDict:
    state = {
        index: {key: change(index, value) for key, value in entries.items()}
        for index, entries in content["state"].items()
    }
    return {**content, "state": state}


def _to_plain(value: Any) -> Any:
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return {_TENSOR: {name: getattr(value, name) for name in names}, "context": context}
    if hasattr(value, "__dict__") and not isinstance(value, Tensor):
        return {_OBJECT: dict(vars(value))}
    return value


def _revived(value: Any, device: torch.device | None, new_object: Callable[[], Any] | None) -> Any:
    if not isinstance(value, Mapping):
        return value
    if _TENSOR in value:
        from torchao.optim.subclass_8bit import OptimState8bit

        tensors = {name: tensor.to(device) for name, tensor in value[_TENSOR].items()}
        return OptimState8bit.__tensor_unflatten__(tensors, value["context"])
    if _OBJECT in value and new_object is not None:
        revived = new_object()
        for name, entry in value[_OBJECT].items():
            setattr(revived, name, entry.to(device) if isinstance(entry, Tensor) else entry)
        return revived
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
