"""Optimizer state in host memory, copied to the device for the update of its parameter.

An update copies the moments to the device and back, 2 x the state's bytes a step over the bus, and
the device holds the state of one parameter at a time. The update is the one that the device makes
without offload, so the weights are equal to the last bit.

A departure from torchao's CPUOffloadOptimizer (torchao/optim/cpu_offload.py), which updates on the
CPU: gradients go down and weights come up, 2 x the weights' bytes a step, and host memory holds a
copy of every weight and every gradient besides the state. In the dtype of the weights, FOAM's state
moves twice that at level 0, the same at level 1 and half at level 2, and the device updates faster
than the CPU. torchao's also has a hook and an inner optimizer per parameter, and so cannot step
inside backward (see `gradient_release`); this can.

The cost of this simplicity: the host waits for each update, and nothing is prefetched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class HostState(dict[str, Any]):
    """The state of one parameter, whose tensors stay in host memory.

    Assigning a tensor to a key that already holds one copies the values into the existing tensor.
    After loading a checkpoint, Lightning moves the state of every optimizer to the device by such
    assignments: so each tensor goes there and comes back, and none stays.
    """

    def __setitem__(self, key: str, value: object) -> None:
        existing = self.get(key)
        if not isinstance(existing, Tensor) or not isinstance(value, Tensor):
            super().__setitem__(key, value)
        elif existing is not value:
            existing.copy_(value)


def host_memory_options(param: Tensor) -> dict[str, Any]:
    """Return the keyword arguments that make a function such as `torch.zeros_like` use host memory.

    For a CUDA parameter host memory is pinned: the bus then transfers directly and at full speed.
    The system cannot swap pinned memory out, and torch may round each tensor up to a power of two.

    Args:
        param: The parameter that the state belongs to, on any device.
    """
    return {"device": torch.device("cpu"), "pin_memory": param.is_cuda}


@contextmanager
def state_on_device(
    tensors: Mapping[str, Tensor], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Copy tensors to a device, and copy them back on leaving the context.

    Args:
        tensors: By name. Those already on the device are used as they are. If an error leaves the
            context, nothing is copied back.
        device: Where to copy them.

    Yields:
        The tensors on the device, by the same names, to be changed in place.
    """
    # The device runs copies and kernels in order, so the update sees these copies complete.
    copies = {name: original.to(device, non_blocking=True) for name, original in tensors.items()}
    yield copies
    for name, original in tensors.items():
        if copies[name] is not original:
            # Blocking, unlike the copy above: code that next reads the host's tensor, to save it or
            # to copy it again, would not know that the device is still writing to it.
            original.copy_(copies[name])
