"""A copy of the model on each device: DDP with its gradients in one place."""

from typing import cast

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override


class SingleCopyDDP(DDPStrategy):
    """DDP whose gradients lie in its buckets from the first micro-batch of a step on.

    torch has buckets for all gradients as long as it trains, and moves a gradient there when it
    averages it. What accumulates until then lies beside the buckets: a second copy of all
    gradients. Here every gradient is its place in its bucket, emptied, before anything is added.
    """

    def __init__(self) -> None:
        # The buffers of the model are constants.
        super().__init__(gradient_as_bucket_view=True, forward_sync_buffers=False)
        self._places: list[tuple[Tensor, Tensor]] = []

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        model = cast(DistributedDataParallel, self.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        _average_nothing(model, parameters)
        for parameter in parameters:
            parameter.grad = None  # or the buckets would live on beside those that follow
        # What torch does once, at the second forward pass: to sort the buckets by what it has seen.
        model.reducer._rebuild_buckets()
        _average_nothing(model, parameters)
        self._places = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        for parameter, place in self._places:
            if parameter.grad is None:
                parameter.grad = place.zero_()


def _average_nothing(model: DistributedDataParallel, parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients of zero, one parameter at a time, so that torch moves them into buckets."""
    model.reducer.prepare_for_backward([])
    for parameter in reversed(parameters):
        parameter.backward(torch.zeros_like(parameter))
