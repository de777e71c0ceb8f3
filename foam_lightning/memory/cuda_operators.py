"""What CUDA operators allocate inside themselves, which a trace on fake CPU tensors cannot see."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Both from aten/src/ATen/native/cuda: the most tokens that are added without sorting them
# (Embedding.cu), and the tokens of a partial sum (EmbeddingBackwardKernel.cu).
_MOST_UNSORTED_TOKENS = 3072
_TOKENS_PER_PARTIAL_SUM = 10


def embedding_backward_bytes(num_tokens: int, vocab_size: int, hidden_size: int) -> int:
    """Count the most bytes that the backward pass of an embedding needs besides its result.

    Beyond 3072 tokens it sorts them and adds their gradients ten at a time, in float32 for weights
    of any dtype; it makes room for as many partial sums as there may be at most.

    Args:
        num_tokens: Tokens of a micro-batch.
        vocab_size: Rows of the embedding.
        hidden_size: Its columns.
    """
    if num_tokens <= _MOST_UNSORTED_TOKENS:
        return 0
    num_distinct = min(num_tokens, vocab_size)
    num_sums = num_tokens // _TOKENS_PER_PARTIAL_SUM + num_distinct
    # The tokens in order, where each came from and where it begins; counts and offsets of the sums.
    indices = 3 * num_tokens + 2 * num_distinct + 2 + num_sums
    return 4 * num_sums * hidden_size + 8 * indices


def bytes_inside(operator: Callable[..., Any], arguments: Sequence[Any]) -> int:
    """Count what an operator allocates on a CUDA device and frees before it returns.

    Others than the embedding's backward need next to nothing, or, as attention's, not at the peak.

    Args:
        operator: An operator of `torch.ops`.
        arguments: Its arguments.
    """
    if operator is not torch.ops.aten.embedding_dense_backward.default:
        return 0
    grad, tokens, vocab_size = arguments[:3]
    return embedding_backward_bytes(tokens.numel(), vocab_size, grad.shape[-1])
