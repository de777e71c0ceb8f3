"""Optimizer state that lives in host memory and visits the device for the update of its parameter.

A visit takes the moments over the bus there and back: 2 x the state's bytes a step, and the device
holds the state of one parameter at a time. The update is the one that the device makes anyway, so
the weights are the same to the last bit.

A departure from torchao's CPUOffloadOptimizer (torchao/optim/cpu_offload.py), which updates on the
CPU: gradients go down and weights come up, 2 x the weights' bytes a step, and host memory holds a
copy of every weight and of every gradient beside the state. In the dtype of the weights, FOAM's
state moves twice that at level 0, the same at level 1 and half at level 2, and the device is the
faster one at the update. torchao's also has hooks and an inner optimizer of its own for every
parameter, and so cannot step inside backward (see `release`), which this can.

The price of simplicity: the host waits for each update, and nothing is fetched ahead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class HostState(dict[str, Any]):
    """The state of one parameter, whose tensors stay where they are.

    A tensor that is assigned to a key that holds one is copied into it. Lightning moves the state
    of every optimizer to the device after it has loaded a checkpoint, by such assignments; so the
    values go there and come back, one tensor at a time, and nothing of them stays.
    """

    def __setitem__(self, key: str, value: object) -> None:
        held = self.get(key)
        if not isinstance(held, Tensor) or not isinstance(value, Tensor):
            super().__setitem__(key, value)
        elif held is not value:
            held.copy_(value)


def pinned_memory(param: Tensor) -> dict[str, Any]:
    """Say to a function that makes tensors where the state of a parameter goes.

    Beside CUDA host memory is pinned: the bus then reads it directly and at full speed. The system
    cannot swap it out, and torch may round each tensor up to a power of two.

    Args:
        param: On any device.

    Returns:
        Keyword arguments, such as for `torch.zeros_like`.
    """
    return {"device": torch.device("cpu"), "pin_memory": param.is_cuda}


@contextmanager
def state_on_device(
    tensors: Mapping[str, Tensor], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Lend tensors to a device, and take back what they have become.

    Args:
        tensors: By name. Those that live on the device are lent as they are; of the others copies
            are lent, and copied back at the end, unless an error ends the visit.
        device: Where to go.

    Yields:
        The tensors on the device, by the same names, to be changed in place.
    """
    # The device does first what it was asked first, so the update finds these copies complete.
    guests = {name: home.to(device, non_blocking=True) for name, home in tensors.items()}
    yield guests
    for name, home in tensors.items():
        if guests[name] is not home:
            # Waits, unlike the copy above: nobody who reads the host's tensor next, to save it or
            # to send it again, would know that the device is still writing to it. With this copy
            # the one above has ended too, so that the host's tensor may be written to again.
            home.copy_(guests[name])
