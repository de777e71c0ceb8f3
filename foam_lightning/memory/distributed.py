"""The first of several devices, traced in this process alone, without communication.

Private parts of torch that are used, checked on torch 2.11 and 2.13: the fake process group and its
store, and `_get_fsdp_state()`, `_pre_forward` and `_post_forward` of FSDP2.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from foam_lightning.distributed.fsdp import shard
from foam_lightning.distributed.topology import Devices
from foam_lightning.errors import ConfigError
from foam_lightning.memory.trace import Traceable
from foam_lightning.settings import Precision

# What NCCL allocates for each communicator outside torch's counters: a buffer of 4 MiB
# (NCCL_BUFFSIZE) for each of at most 32 channels, to send and to receive. This is the maximum of
# NCCL's defaults; fewer channels, as between cards without NVLink, need less. Not measured yet.
NCCL_BYTES = 2 * 32 * 4 * 2**20
# torch fills the first bucket of DDP up to 1 MiB and each of the others up to 25 MiB
# (dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_cap_mb).
_BUCKET_BYTES = (2**20, 25 * 2**20)

# Prepares a freshly built module as the first rank has it.
Join = Callable[[Traceable], None]


@contextmanager
def as_first_device(devices: Devices, precision: Precision) -> Iterator[Join]:
    """Prepare modules, in fake mode, as the first of these devices has them.

    With FSDP2, torch's fake process group stands for the other ranks: every collective returns at
    once, and allocates what a real one would. With DDP, the caller counts the buckets (see
    `bucket_sizes`); a gradient is added to its bucket as soon as it is complete, and then freed.

    Args:
        devices: The devices.
        precision: Lightning's name of the precision.

    Yields:
        A function to call with the module.

    Raises:
        ConfigError: This process already is one of several.
    """
    if not devices.shards:
        yield _fill_buckets if devices.count > 1 else lambda _module: None
        return
    with _fake_group(devices.count) as mesh:
        yield lambda module: _shard(module, mesh, precision)


def num_communicators(devices: Devices) -> int:
    """Count the NCCL communicators of a run on a GPU.

    With FSDP2 there are two: that of the mesh, and that of all processes for metrics and barriers.
    """
    if devices.count == 1:
        return 0
    return 2 if devices.shards else 1


def bucket_sizes(devices: Devices, sizes: Iterable[int]) -> list[int]:
    """Return the bytes of each bucket of DDP, which hold all gradients from the first step on.

    Parameters are added from the last to the first; a bucket is full once it reaches its cap.

    Args:
        devices: The devices; without DDP there are no buckets.
        sizes: Bytes of every parameter, in the order of the module.
    """
    if devices.count == 1 or devices.shards:
        return []
    found = [0]
    for size in reversed(list(sizes)):
        if found[-1] >= _BUCKET_BYTES[min(len(found) - 1, 1)]:
            found.append(0)
        found[-1] += size
    return found


def _fill_buckets(module: Traceable) -> None:
    """Free each gradient once it could be added to its bucket."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(free)


def _shard(module: Traceable, mesh: DeviceMesh, precision: Precision) -> None:
    assert isinstance(module, nn.Module)
    shard(module, module.layers(), mesh, precision)
    assert isinstance(module, FSDPModule)
    # The trace runs in two halves what FSDP2 sees as one forward pass, so the hooks at its start
    # and its end are called here; there is no public name for either.
    state = module._get_fsdp_state()
    hidden_states, mean_loss = module.hidden_states, module.mean_loss

    def begin(input_ids: Tensor) -> Tensor:
        state._pre_forward(module, (), {})
        hidden: Tensor = hidden_states(input_ids)
        return hidden

    def end(hidden: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = state._post_forward(module, (), mean_loss(hidden, labels))
        return loss

    module.hidden_states, module.mean_loss = begin, end  # type: ignore[method-assign]


@contextmanager
def _fake_group(count: int) -> Iterator[DeviceMesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError(
            "the account of several devices is made before their processes join; call it earlier"
        )
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()
