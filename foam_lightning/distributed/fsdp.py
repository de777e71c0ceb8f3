"""Weights, gradients and state divided among devices: FSDP2 on the decoder layers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

# They run the model in pieces, not through its `forward`.
_FORWARD_METHODS = ("training_step", "validation_step")


def shard(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, precision: Any) -> None:
    """Divide every parameter among the devices of a mesh, by rows.

    A decoder layer is gathered for its forward and again for its backward pass; embedding, last
    norm and head, which the root holds, from the beginning of the one to the end of the other.

    The module comes with its weights, so that they are those of one process: every process holds
    the whole model in host memory until then, and moves its share to the device layer by layer.

    In mixed precision, weights are gathered in bfloat16 and gradients are reduced in float32. So
    the residual stream is bfloat16, where autocast on one device leaves it in float32.

    Args:
        module: The root.
        layers: Its decoder layers.
        mesh: One dimension, the devices.
        precision: Lightning's name of the precision.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16-mixed"
        else MixedPrecisionPolicy()
    )
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for method in _FORWARD_METHODS:
        register_fsdp_forward_method(module, method)


def local_shard(tensor: Tensor) -> Tensor:
    """Give the rows of a divided tensor that this process has, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
