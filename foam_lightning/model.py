"""LLaMA through transformers: describe, build, load and save it."""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from foam_lightning.devices import is_first_process
from foam_lightning.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

# Causal attention without a mask, under a name of our own. Under "sdpa" transformers looks at the
# values of a mask it makes for every forward pass to find that it is not needed: a GPU waits for
# that, and fake tensors have no values, so an account of them would keep masks that no run makes.
_ATTENTION = "sdpa_causal"
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
# The numbers that make two models the same model to a fold plan.
_FINGERPRINT = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def describe(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None,
    vocab_size: int,
    max_position_embeddings: int,
) -> "LlamaConfig":
    """Turn sizes into a transformers configuration, untied embedding and head, SDPA attention.

    Raises:
        ConfigError: A size is below 1, or the heads do not divide what they must.
    """
    from transformers import LlamaConfig

    sizes = dict(locals())
    sizes.pop("LlamaConfig")
    sizes["num_key_value_heads"] = num_key_value_heads or num_attention_heads
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model.{name} must be 1 or more, got {size}")
    if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 2:
        raise ConfigError(
            f"model.hidden_size {hidden_size} must be an even multiple of "
            f"model.num_attention_heads {num_attention_heads}"
        )
    if num_attention_heads % sizes["num_key_value_heads"]:
        raise ConfigError(
            f"model.num_attention_heads {num_attention_heads} must be a multiple of "
            f"model.num_key_value_heads {num_key_value_heads}"
        )
    # Special tokens are the tokenizer's to say: `save` asks it.
    return LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)


def read_config(folder: str) -> "LlamaConfig":
    """Read the configuration of a local Hugging Face LLaMA folder.

    Raises:
        CheckpointError: There is no such folder, no readable `config.json`, or it is no LLaMA.
    """
    from transformers import AutoConfig, LlamaConfig

    if not Path(folder, "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; pass a local Hugging Face LLaMA folder"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {folder}/config.json: {_line(error)}") from error
    if not isinstance(config, LlamaConfig):
        raise CheckpointError(
            f"{folder} holds a {config.model_type} model; only llama is supported"
        )
    return config


def fingerprint(config: "LlamaConfig") -> dict[str, int | bool]:
    """List the sizes that a fold plan must agree with, in the order they are compared."""
    return {name: getattr(config, name) for name in _FINGERPRINT}


def lay_out(config: "LlamaConfig") -> "LlamaForCausalLM":
    """Make the model wherever tensors are made now: under the meta device or in fake mode.

    The weights are not meant to be used; `build` draws them.
    """
    from transformers import LlamaForCausalLM

    return _without_mask(LlamaForCausalLM(config))


def build(config: "LlamaConfig", *, seed: int) -> "LlamaForCausalLM":
    """Make a freshly initialised model on the default device and in the default dtype.

    The model is laid out on the meta device first, so that a large one is never held twice, and
    drawn from its own random stream, so that equal seeds are equal weights.
    """
    with torch.device("meta"):
        model = lay_out(config)
    model.to_empty(device=torch.get_default_device())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.init_weights()
    return model


def load(folder: str) -> "LlamaForCausalLM":
    """Load the weights of a local Hugging Face LLaMA folder, in the default dtype.

    Raises:
        CheckpointError: The folder is not a LLaMA, or its weights are missing or do not fit it.
    """
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    config = read_config(folder)
    try:
        loaded: Any = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.get_default_dtype(),
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the weights in {folder}: {_line(error)}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder} lacks {len(report['missing_keys'])} weights, the first is "
            f"{min(report['missing_keys'])}"
        )
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{folder} has {name} of shape {tuple(found)}, its config.json asks for {tuple(wanted)}"
        )
    return _without_mask(model)


def save(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder beside `folder` and rename it, so that no half one is ever seen.

    The model's special tokens become the tokenizer's, so that whoever loads it stops at the right
    one. Of several processes that train together the first alone writes.

    Args:
        model: Says what it is, and has the weights where they are not given.
        tokenizer: Goes with it.
        folder: Replaced if it exists.
        weights: Whole, by name, where the model has but a share of them.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    _write(
        folder,
        lambda beside: model.save_pretrained(beside, state_dict=weights),
        tokenizer.save_pretrained,
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer alone in the same way.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    _write(folder, tokenizer.save_pretrained)


def _write(folder: Path, *parts: Callable[[Path], object]) -> None:
    if not is_first_process():
        return
    beside = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for write_part in parts:
            write_part(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"cannot write {folder}: {_line(error)}") from error


def keep_rope_float32(model: "LlamaForCausalLM") -> None:
    """Recompute the rotary frequencies in float32 after a cast of the whole model.

    A pure-bfloat16 run casts every buffer; the frequencies then carry errors of up to 0.4 %,
    which grow with the position.
    """
    rope = model.model.rotary_emb
    if rope.inv_freq.dtype == torch.float32:
        return
    with rope.inv_freq.device:
        fresh = type(rope)(rope.config)
    rope.inv_freq = fresh.inv_freq.float()
    rope.original_inv_freq = fresh.inv_freq.float().clone()


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


def _without_mask(model: "LlamaForCausalLM") -> "LlamaForCausalLM":
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    model.set_attn_implementation(_ATTENTION)
    return model


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
