"""A second device on a machine that has none: tensors that claim to be elsewhere, and a bus."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

# A device that every torch knows; nothing here is without values, as tensors there usually are.
AWAY = torch.device("meta")


class AwayTensor(Tensor):
    """A tensor on the second device: one of the CPU that is not to be seen."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner):
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=AWAY
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, *_):
        raise RuntimeError(f"{func} on the second device, which is off: enter SecondDevice")


class SecondDevice(TorchDispatchMode):
    """While active, tensors may go to `AWAY`.

    Refused are tensors of both devices in one operation, and copies to the CPU that would still be
    under way when the CPU looks at them.

    Attributes:
        sent_bytes: Copied from the CPU to the device.
        returned_bytes: Copied from the device to the CPU.
        peak_bytes: The most that was there at once, views of others not counted.
    """

    def __init__(self):
        super().__init__()
        self.sent_bytes = self.returned_bytes = self.peak_bytes = 0
        self._there = WeakIdKeyDictionary()

    def alive(self):
        """List the tensors that are there and are no view of another."""
        own = {}
        for tensor in self._there:
            own.setdefault(tensor.inner.untyped_storage()._cdata, tensor)
        return list(own.values())

    def alive_bytes(self):
        """Add up what is there."""
        return sum(tensor.inner.untyped_storage().nbytes() for tensor in self.alive())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((*args, *kwargs.values())))
        if any(isinstance(x, DTensor) for x in tensors):
            return NotImplemented  # its shards come by themselves
        away = [x for x in tensors if isinstance(x, AwayTensor)]
        device = kwargs.get("device")
        goes = bool(away) if device is None else device == AWAY
        if not away and not goes:
            return func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            self._take(args[0], to_away=goes, waits=not kwargs.get("non_blocking"))
        elif func is torch.ops.aten.copy_.default:
            goes = isinstance(args[0], AwayTensor)
            self._take(args[1], to_away=goes, waits=not (args[2:] and args[2]))
        elif any(x.ndim and not isinstance(x, AwayTensor) for x in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*_inner(args), **{key: _inner(value) for key, value in kwargs.items()})
        if not goes:
            return result
        # What an operation in place returns is what it was given.
        given = {id(x.inner): x for x in away}
        return _mapped(result, Tensor, lambda x: given[id(x)] if id(x) in given else self._away(x))

    def _away(self, inner):
        made = AwayTensor(inner)
        self._there[made] = None
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes())
        return made

    def _take(self, source, *, to_away, waits):
        """Count a copy over the bus."""
        if to_away and not isinstance(source, AwayTensor):
            self.sent_bytes += source.nbytes
        elif not to_away and isinstance(source, AwayTensor):
            self.returned_bytes += source.nbytes
            if not waits:
                raise RuntimeError("a copy to the CPU that the CPU does not wait for")


def here(tensors):
    """Look at the values of tensors, wherever they are."""
    return [x.inner if isinstance(x, AwayTensor) else x for x in tensors]


def _inner(tree):
    return _mapped(tree, AwayTensor, lambda x: x.inner)


def _tensors(tree):
    for leaf in tree:
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, list | tuple):
            yield from _tensors(leaf)


def _mapped(tree, kind, function):
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(leaf, kind, function) for leaf in tree])
    return function(tree) if isinstance(tree, kind) else tree
