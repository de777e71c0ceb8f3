"""Activation checkpointing of decoder layers, whole or selective.

Checked on torch 2.11 and 2.13, and on transformers 5.17 and newer.
"""

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Operators of a linear layer without and with bias.
_LINEAR_OPS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# Operators of attention: fused ones of the CPU and of CUDA, and plain matrix products.
_ATTENTION_OPS = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten.bmm.default,
)


def checkpoint_layers(model: "LlamaForCausalLM", *, selective: bool) -> None:
    """Checkpoint the decoder layers: save fewer activations, and recompute the rest in backward.

    Selective checkpointing saves the input of a layer and the outputs of matrix products and
    attention: queries, keys and values, the attention output with its log-sum-exp, the output of
    `o_proj`, which the second norm needs, gate and up. It recomputes norms, RoPE, activation,
    element-wise products and casts, so no matrix product runs twice. The output of `down_proj` is
    not saved, as backward does not need it. Saving it too would cost 8192 bytes more in the first
    row below; saving neither it nor the output of `o_proj` would cost one matrix product a layer.

    Python intercepts each of the 74 operators of a selective layer in forward and in recomputation,
    which takes twice the CPU time of a whole layer (9 against 4.5 ms on a busy Xeon at 2.5 GHz).
    Where a GPU waits for the CPU, with few tokens in a micro-batch, whole layers are faster.

    Bytes saved per token and layer of LLaMA 7B, measured on the CPU with `StorageTracker`. Without
    checkpointing bf16-mixed also saves a bfloat16 copy of all weights, which is not included.

    | precision | no checkpointing | selective | whole layers |
    |---|---|---|---|
    | bf16-true | 186504 | 93312 | 8192 |
    | bf16-mixed | 227464 | 101504 | 16384 |
    | 32-true | 340104 | 186496 | 16384 |

    Args:
        model: Changed; affects training only, not evaluation.
        selective: Selective checkpointing; otherwise each layer saves only its input.
    """
    settings: dict[str, Any] = {"use_reentrant": False}
    if selective:
        layer = model.model.layers[0]
        num_linear = sum(isinstance(part, torch.nn.Linear) for part in layer.modules())
        settings["context_fn"] = partial(_selective_contexts, num_linear)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:  # transformers 5.17
        model.gradient_checkpointing_enable(settings)


def _selective_contexts(num_linear: int) -> tuple[Any, Any]:
    """Create the contexts of one pass through a layer, for forward and for recomputation."""
    # Number the linear layers; `down_proj` is the last. torch 2.11 calls `choose` in forward and
    # again in recomputation, newer versions only in forward.
    numbers = {False: count(1), True: count(1)}

    def choose(
        context: SelectiveCheckpointContext, operator: object, *_: object, **__: object
    ) -> CheckpointPolicy:
        if operator in _LINEAR_OPS:
            is_saved = next(numbers[context.is_recompute]) < num_linear
        else:
            is_saved = operator in _ATTENTION_OPS
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.MUST_RECOMPUTE

    forward, recomputing = create_selective_checkpoint_contexts(choose)
    return forward, recomputing
