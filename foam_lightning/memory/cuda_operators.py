"""What CUDA operators allocate inside themselves, which a trace on fake CPU tensors cannot see."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def attention_backward_bytes(query: Tensor, key: Tensor) -> int:
    """Count the bytes that the backward pass of fused attention needs besides its results.

    In half precision, flash attention adds up the gradient of the queries in float32, and makes
    those of keys and values for every query head (mha_bwd in flash_attn/flash_api.cpp, without
    `deterministic`, which makes the first one more than once for few rows). The workspace of
    cuDNN's is of the same size. In float32 the efficient kernel multiplies the output by its
    gradient first (attention_backward.cu): as many bytes.

    Args:
        query: (B, heads, S, head size).
        key: (B, key and value heads, S, head size).
    """
    rows, heads, tokens, size = query.shape
    places = rows * heads * _round_up(tokens, 128)
    sums = 4 * places * (_round_up(size, 32) + 1)  # one more for the sums of the softmax
    expanded = 0 if key.shape[1] == heads else 2 * query.nbytes
    return sums + expanded


def bytes_inside(operator: Callable[..., Any], arguments: Sequence[Any]) -> int:
    """Count what an operator allocates on a CUDA device and frees before it returns.

    Others than the backward passes of embedding and attention need next to nothing.

    Args:
        operator: An operator of `torch.ops`.
        arguments: Its arguments.
    """
    if operator is torch.ops.aten.embedding_dense_backward.default:
        grad, tokens, vocab_size = arguments[:3]
        return embedding_backward_bytes(tokens.numel(), vocab_size, grad.shape[-1])
    if operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return attention_backward_bytes(*arguments[1:3])
    return 0


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
