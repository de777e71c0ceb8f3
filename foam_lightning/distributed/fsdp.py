"""FSDP2 on the decoder layers: weights, gradients and optimizer state sharded by rows."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def shard(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, precision: Any) -> None:
    """Shard every parameter by rows over the devices of a mesh.

    A decoder layer is gathered for its forward and again for its backward pass. The root holds
    embedding, last norm and head, which stay gathered from the forward to the end of the backward
    pass.

    The module has its weights already, so that they equal those of one process: every process holds
    the whole model in host memory before, and moves its shards to the device layer by layer.

    In mixed precision, weights are gathered in bfloat16 and gradients reduced in float32. The
    residual stream is then bfloat16, whereas autocast on one device keeps it in float32.

    Args:
        module: The root.
        layers: Its decoder layers.
        mesh: A mesh of one dimension.
        precision: Lightning's name of the precision.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16-mixed"
        else MixedPrecisionPolicy()
    )
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # They call parts of the model instead of its `forward`.
    for method in ("training_step", "validation_step"):
        register_fsdp_forward_method(module, method)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
