"""What a model computes for a token, and what a device could compute in a second."""

import math
import warnings
from collections.abc import Mapping

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from foam_lightning.roles import role_of


def flops_per_token(shapes: Mapping[str, tuple[int, ...]], sequence_length: int) -> int:
    """Count the operations that training needs for one token, forward and backward.

    6 N + 12 L H Q T of PaLM (Chowdhery et al., arXiv 2204.02311), appendix B: two operations for
    every weight and three passes; and of every layer's H heads of size Q the products of queries
    and keys, and of weights and values, over the whole row. What activation checkpointing computes
    twice does not count: the model has no use for it. A departure: N leaves out the embedding,
    where it is only looked up, and norms.

    Args:
        shapes: Of every parameter, by qualified name.
        sequence_length: Tokens in a row, T.
    """
    has_head = any("lm_head" in name for name in shapes)  # a tied one is the embedding itself
    num_weights = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) > 1 and not (has_head and "embed_tokens" in name)
    )
    heads = sum(shape[0] for name, shape in shapes.items() if _makes_queries(name, shape))
    return 6 * num_weights + 12 * heads * sequence_length


def _makes_queries(name: str, shape: tuple[int, ...]) -> bool:
    return role_of(name) == "q" and len(shape) > 1  # not its bias


def peak_flops(device: torch.device, precision: str) -> int | None:
    """Look up what a device could compute, in operations a second.

    The figures are Lightning's and no better than that: from data sheets, for consumer cards
    without tensor cores, for few with sparsity.

    Args:
        device: The device of this process.
        precision: Lightning's name of the precision.

    Returns:
        None for a CPU and for a card that Lightning does not know.
    """
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a card is unknown is an answer
        return get_available_flops(device, dtype)
