"""The next-token loss, whole or in chunks, and its mean over the tokens of an optimizer step."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

IGNORED = -100
# Smaller chunks save little memory: logits of 256 tokens are small compared to a layer. More than
# 64 chunks only cost speed.
_MIN_CHUNK_TOKENS = 256
_MAX_CHUNKS = 64


def token_loss(
    hidden: Tensor, head: torch.nn.Linear, labels: Tensor, *, chunked: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of every next token, in nats and in float32.

    `torch.nn.functional.linear_cross_entropy` also works in chunks, but as one opaque operator,
    whose memory the account cannot measure. Chunks under `torch.utils.checkpoint` need as little
    memory and are measured.

    Args:
        hidden: Hidden states, (B, S, H).
        head: The output layer, H to V.
        labels: Token ids, (B, S), not shifted: position s predicts `labels[:, s + 1]`. Labels of
            -100 are ignored.
        chunked: Process 1/64 of the tokens at a time, at least 256, and recompute their logits in
            backward, so that the (B * S, V) logits never exist.

    Returns:
        The sum over labelled tokens, a float32 scalar, and their number, an int64 scalar.
    """
    states = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    num_tokens = (targets != IGNORED).sum()
    if not chunked:
        return _sum_nll(states, head, targets), num_tokens
    chunk = max(_MIN_CHUNK_TOKENS, -(-len(targets) // _MAX_CHUNKS))
    chunks = [
        checkpoint(
            _sum_nll, rows, head, chunk_targets, use_reentrant=False, preserve_rng_state=False
        )
        for rows, chunk_targets in zip(states.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(chunks).sum(), num_tokens


def min_rows_for_chunks(sequence_length: int) -> int:
    """Return the smallest number of rows whose tokens need more than one chunk.

    Args:
        sequence_length: Tokens in a row; all but the last predict the next.
    """
    return _MIN_CHUNK_TOKENS // max(1, sequence_length - 1) + 1


def _sum_nll(states: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    logits = head(states).float()
    return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


class StepMean:
    """Average the loss over all labelled tokens of an optimizer step, whatever its micro-batches.

    A mean of micro-batch means would weigh tokens of short micro-batches more, so that a memory
    budget, which decides micro-batch sizes, would change what is learned. The number of labelled
    tokens is known only at the end of the step. Until then each micro-batch is divided by its
    number of positions, equal on every rank; before clipping, gradients are rescaled by positions /
    labelled tokens. For full rows that factor is exactly 1.
    """

    def __init__(self) -> None:
        self._nats: Tensor | int = 0
        self._num_tokens: Tensor | int = 0
        self._positions = 1

    def backward_loss(
        self, total: Tensor, num_tokens: Tensor, labels: Tensor, trainer: Trainer
    ) -> Tensor:
        """Return the loss to backpropagate for a micro-batch.

        Args:
            total: The sum over its labelled tokens, a scalar.
            num_tokens: Their number, an int64 scalar; may be 0.
            labels: (B, S), the same shape in every micro-batch.
            trainer: Averages gradients over micro-batches and ranks.
        """
        self._nats = self._nats + total.detach()
        self._num_tokens = self._num_tokens + num_tokens
        if _is_single_micro_batch(trainer):
            return total / num_tokens.clamp(min=1)
        self._positions = max(1, labels[:, 1:].numel())
        return total / self._positions

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the loss of the step so far on this rank: nats, and the number of tokens."""
        return torch.as_tensor(self._nats), torch.as_tensor(self._num_tokens)

    def rescale_gradients(self, parameters: Iterable[Tensor], trainer: Trainer) -> None:
        """Rescale the gradients to the mean over labelled tokens, after all micro-batches.

        Args:
            parameters: Their gradients are averages over micro-batches and ranks.
            trainer: Sums over ranks.
        """
        local = torch.as_tensor(self._num_tokens)
        self._nats = self._num_tokens = 0
        if _is_single_micro_batch(trainer):
            return
        num_tokens = trainer.strategy.reduce(local, reduce_op="sum")
        assert isinstance(num_tokens, Tensor)
        positions = self._positions * trainer.accumulate_grad_batches * trainer.world_size
        factor = positions / num_tokens.clamp(min=1)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _is_single_micro_batch(trainer: Trainer) -> bool:
    """Return whether one micro-batch is the whole step, so that its mean is known at once."""
    return trainer.accumulate_grad_batches == trainer.world_size == 1
