"""The mean over a step: every scored token counts the same, whichever micro-batch it is in."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class StepMean:
    """Turn sums over micro-batches into the mean over all scored tokens of an optimizer step.

    The mean of the means of micro-batches would give a token in a short one more weight, and a
    memory budget, which decides their size, would change what is learned. How many tokens a step
    scores is known at its end; until then the places of a micro-batch stand for them, of which
    there are as many in each, on every rank. The gradients are corrected before they are clipped.
    In full rows the factor is exactly 1.
    """

    def __init__(self) -> None:
        self._nats: Tensor | int = 0
        self._scored: Tensor | int = 0
        self._places = 1

    def share(self, total: Tensor, num_tokens: Tensor, labels: Tensor, trainer: Trainer) -> Tensor:
        """Give what a micro-batch goes backward from.

        Args:
            total: The sum over its scored tokens, a scalar.
            num_tokens: How many they are, an int64 scalar; 0 is allowed.
            labels: (B, S), of the same shape in every micro-batch.
            trainer: Averages over micro-batches and ranks.
        """
        self._nats = self._nats + total.detach()
        self._scored = self._scored + num_tokens
        if _is_whole(trainer):
            return total / num_tokens.clamp(min=1)
        self._places = max(1, labels[:, 1:].numel())
        return total / self._places

    def sums(self) -> tuple[Tensor, Tensor]:
        """Give what this rank has of the step so far: nats, and over how many tokens."""
        return torch.as_tensor(self._nats), torch.as_tensor(self._scored)

    def complete(self, parameters: Iterable[Tensor], trainer: Trainer) -> None:
        """Correct the gradients of a step, when all its micro-batches went backward.

        Args:
            parameters: They have averages over micro-batches and ranks of what `share` gave.
            trainer: Adds up over ranks.
        """
        own = torch.as_tensor(self._scored)
        self._nats = self._scored = 0
        if _is_whole(trainer):
            return
        scored = trainer.strategy.reduce(own, reduce_op="sum")
        assert isinstance(scored, Tensor)
        stood_for = self._places * trainer.accumulate_grad_batches * trainer.world_size
        factor = stood_for / scored.clamp(min=1)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _is_whole(trainer: Trainer) -> bool:
    """Tell whether a micro-batch is a whole step: then its gradients may be spent at once."""
    return trainer.accumulate_grad_batches == trainer.world_size == 1
