"""DDP with one copy of the gradients.

Uses a private part of torch, checked on torch 2.11 and 2.13: `Reducer._rebuild_buckets`, on which
the peaks in tests/distributed/test_distributed.py depend.
"""

from typing import cast

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override


class SingleCopyDDP(DDPStrategy):
    """DDP whose gradients are views of its buckets from the first micro-batch of a step on.

    torch allocates buckets for all gradients, and makes a gradient a view of its bucket only when
    it averages it. With accumulation, gradients until then are a second copy. Here every gradient
    is a zeroed view of its bucket before the first backward pass of a step.
    """

    def __init__(self) -> None:
        # The buffers of the model never change.
        super().__init__(gradient_as_bucket_view=True, forward_sync_buffers=False)
        self._views: list[tuple[Tensor, Tensor]] = []

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        model = cast(DistributedDataParallel, self.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        _average_zeros(model, parameters)
        for parameter in parameters:
            parameter.grad = None  # or the first buckets would stay allocated
        # torch does this once, at the second forward pass, in the order of the gradients it saw.
        model.reducer._rebuild_buckets()
        _average_zeros(model, parameters)
        self._views = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        for parameter, view in self._views:
            if parameter.grad is None:
                parameter.grad = view.zero_()


def _average_zeros(model: DistributedDataParallel, parameters: list[torch.nn.Parameter]) -> None:
    """Average zero gradients, one parameter at a time, so that they become views of buckets."""
    model.reducer.prepare_for_backward([])
    for parameter in reversed(parameters):
        parameter.backward(torch.zeros_like(parameter))
