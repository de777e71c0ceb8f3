"""The loss, whole or in chunks, and its mean over all tokens of an optimizer step."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

IGNORED = -100
# Logits of 256 tokens are small beside a layer; more than 64 chunks cost speed for nothing.
_LEAST_TOKENS = 256
_MOST_CHUNKS = 64


def token_loss(
    hidden: Tensor, head: torch.nn.Linear, labels: Tensor, *, chunked: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of every next token, in nats and in float32.

    `torch.nn.functional.linear_cross_entropy` also works in chunks, but as one opaque operator:
    the memory inside it is invisible to the account, and a peak that cannot be seen cannot be
    promised. Chunks under torch's own checkpoint are as small and are seen.

    Args:
        hidden: Hidden states, (B, S, H).
        head: The output layer, H to V.
        labels: Token ids, (B, S), not shifted: position s is scored on `labels[:, s + 1]`.
            Positions labelled -100 do not count.
        chunked: Score a 64th of the tokens at a time, but at least 256, and recompute their
            logits in backward, so that (B * S, V) logits never exist.

    Returns:
        The sum over scored tokens, a float32 scalar, and how many they are, an int64 scalar.
    """
    states = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    num_tokens = (targets != IGNORED).sum()
    if not chunked:
        return _summed(states, head, targets), num_tokens
    chunk = max(_LEAST_TOKENS, -(-len(targets) // _MOST_CHUNKS))
    pieces = [
        checkpoint(_summed, rows, head, wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted in zip(states.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(pieces).sum(), num_tokens


def least_rows_in_chunks(sequence_length: int) -> int:
    """Count the rows from which the tokens to score are more than one chunk.

    Args:
        sequence_length: Tokens in a row, of which all but the last are scored on the next.
    """
    return _LEAST_TOKENS // max(1, sequence_length - 1) + 1


def _summed(states: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    logits = head(states).float()
    return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


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
