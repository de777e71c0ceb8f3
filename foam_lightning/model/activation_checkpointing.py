"""Decoder layers that keep little of what they compute, and compute the rest again."""

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# What a linear layer comes down to, without bias and with.
_LINEAR = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# What attention comes down to: a fused operator of the CPU or of CUDA, or plain products.
_ATTENTION_PRODUCTS = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten.bmm.default,
)


def checkpoint_layers(model: "LlamaForCausalLM", *, selective: bool) -> None:
    """Have the decoder layers keep little of what they compute, and compute the rest again.

    A selective layer keeps its input and what matrix products and attention made of it: queries,
    keys and values, the output of attention with its logarithms of sums, the output of `o_proj`,
    which the second norm needs, and gate and up. It recomputes norms, rotation, activation,
    products of elements and casts, so no matrix product runs twice. The output of `down_proj` is
    not kept: it is only ever added to something. To keep that too costs 8192 bytes more in the
    first row below; to keep neither it nor that of `o_proj` costs one matrix product a layer.

    Python looks at each of the 74 operators of a selective layer, forward and again: twice the
    processor's time of a whole one, 9 ms against 4.5 on a busy Xeon at 2.5 GHz. Where a GPU waits
    for its processor, with few tokens in a micro-batch, whole layers are the faster ones.

    Kept per token and layer of LLaMA 7B, in bytes, on the CPU and by `StorageTracker`; without
    checkpointing bf16-mixed also keeps a bfloat16 copy of all weights, which is left out here:

    | precision | nothing recomputed | selective | whole layers recomputed |
    |---|---|---|---|
    | bf16-true | 186504 | 93312 | 8192 |
    | bf16-mixed | 227464 | 101504 | 16384 |
    | 32-true | 340104 | 186496 | 16384 |

    Args:
        model: It trains with its layers so from now on, and evaluates as ever.
        selective: Keep those results too; else each layer keeps its input alone.
    """
    settings: dict[str, Any] = {"use_reentrant": False}
    if selective:
        layer = model.model.layers[0]
        num_linear = sum(isinstance(part, torch.nn.Linear) for part in layer.modules())
        settings["context_fn"] = partial(_products_kept, num_linear)
    model.activation_checkpointing_enable(settings)


def _products_kept(num_linear: int) -> tuple[Any, Any]:
    """Make the contexts of one pass through a layer: forward, and when it is recomputed."""
    numbers = count(1)

    def choose(_context: object, operator: object, *_: object, **__: object) -> CheckpointPolicy:
        kept = (
            next(numbers) < num_linear if operator in _LINEAR else operator in _ATTENTION_PRODUCTS
        )
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE

    forward, recomputing = create_selective_checkpoint_contexts(choose)
    return forward, recomputing
