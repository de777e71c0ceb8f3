"""The language-model loss: head and cross entropy, on all tokens at once or chunk by chunk."""

import torch
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
