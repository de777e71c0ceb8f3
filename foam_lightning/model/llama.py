"""Create and save LLaMA models of transformers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.errors import ConfigError
from foam_lightning.model.int8_weights import plain_state
from foam_lightning.storage.atomic import write_folder
from foam_lightning.validation import MODEL, check_ranges

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

# Causal attention without a mask, registered under our own name. Under "sdpa", transformers creates
# a mask in every forward pass and reads its values to find that it is not needed. A GPU waits for
# that, and fake tensors have no values, so the memory account would count masks that no run keeps.
_ATTENTION = "sdpa_causal"
# Supported architectures by `model_type` in config.json: LLaMA and those whose decoder, layers and
# head have the same names. "LLaMA" in types and docstrings here means any of them.
MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",  # also TinyLlama, and SmolLM 1 and 2
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A fold plan fits models that agree in these.
_FINGERPRINT = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def create_config(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None,
    vocab_size: int,
    max_position_embeddings: int,
) -> "LlamaConfig":
    """Create a LLaMA configuration with untied embedding and head.

    Raises:
        ConfigError: A size is out of range, or not a multiple of the number of heads.
    """
    from transformers import LlamaConfig

    sizes = dict(locals())
    sizes.pop("LlamaConfig")
    sizes["num_key_value_heads"] = num_key_value_heads or num_attention_heads
    check_ranges("model.", sizes, MODEL)
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
    # `save_model` sets the special tokens to those of the tokenizer.
    return LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)


def set_num_layers(config: "LlamaConfig", num_layers: int) -> "LlamaConfig":
    """Set the number of layers of a configuration, in place, and return it.

    Of fewer layers the last ones have the types of attention that are lost, such as the full one of
    every sixth layer of Gemma 3, since each type has angles of RoPE of its own.
    """
    config.num_hidden_layers = num_layers
    if types := getattr(config, "layer_types", None):  # one per layer
        kept = types[:num_layers]
        lost = sorted(set(types) - set(kept))
        config.layer_types = [*kept[: num_layers - len(lost)], *lost]
    return config


def check_sequence_length(config: "LlamaConfig", length: int) -> None:
    """Check that rows are no longer than a sliding attention window.

    Attention has no mask here; rows within the window (4096 tokens in Mistral 7B v0.1) need none.

    Raises:
        ConfigError: Rows are longer than the window.
    """
    window: int | None = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"])
    if slides and window is not None and length > window:
        raise ConfigError(
            f"rows of {length} tokens exceed the model's attention window of {window} tokens "
            f"(sliding_window); set data.sequence_length to {window} or less"
        )


def fingerprint(config: "LlamaConfig") -> dict[str, int | bool]:
    """Return the sizes that a fold plan must agree with, in the order of comparison."""
    return {name: getattr(config, name) for name in _FINGERPRINT}


def create_uninitialized(config: "LlamaConfig") -> "LlamaForCausalLM":
    """Create a model whose weights are not initialized, for the meta device or fake tensors."""
    return use_causal_attention(model_class(config)(config))


def create_initialized(config: "LlamaConfig", *, seed: int) -> "LlamaForCausalLM":
    """Create a model with random weights on the default device and in the default dtype.

    It is created on the meta device first, so that a large one is never in memory twice. The
    weights depend only on `seed`, and the global random generator does not change.
    """
    with torch.device("meta"):
        model = create_uninitialized(config)
    model.to_empty(device=torch.get_default_device())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.init_weights()
    return model


def use_causal_attention(model: "LlamaForCausalLM") -> "LlamaForCausalLM":
    """Switch a model to causal attention without masks, in place, and return it."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    model.set_attn_implementation(_ATTENTION)
    return model


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers does under "sdpa", with a fused kernel for grouped queries in float32.

    On a GPU flash attention and that of cuDNN take half precision only, and the efficient kernel
    takes no grouped queries (torch up to 2.13, `sdp_utils.cpp`). The plain products that are left
    keep S x S numbers for every head. So in float32 keys and values are repeated, H / (number of
    key heads) times as many bytes; on the CPU too, so that the memory account counts them. A single
    query, while generating, has S x 1 numbers and needs no fused kernel.

    Args:
        module: The attention layer.
        query: (B, heads, S, head size).
        key: (B, key and value heads, S, head size).
        value: As `key`.
        attention_mask: None, except where a caller passes a mask of its own.
        options: As transformers passes them.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    attention: Any = module
    repeats, device = query.shape[1] // key.shape[1], query.device.type
    is_half = torch.is_autocast_enabled(device) or query.dtype != torch.float32
    if repeats > 1 and query.shape[2] > 1 and not is_half:
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        attention = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # no groups
    return sdpa_attention_forward(attention, query, key, value, attention_mask, **options)


def model_class(config: "LlamaConfig") -> Any:
    """Return the model class of transformers for a configuration."""
    import transformers

    return getattr(transformers, MODEL_CLASSES[config.model_type])


def save_model(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    *,
    end_of_turn: int | None = None,
) -> None:
    """Save model and tokenizer as a Hugging Face folder, atomically.

    Sets the special tokens of the model to those of the tokenizer, so that generation stops at the
    right one. A list of tokens that contains the tokenizer's stays, and so does a token for which
    the tokenizer has none within the vocabulary. Tied weights are saved once. RoPE settings
    and tokenizer are also readable by transformers 4. Of several ranks only the first writes.

    Args:
        model: The model.
        tokenizer: Its tokenizer; None saves the model alone.
        folder: Replaced if it exists.
        weights: Full weights by name, if the model has only a shard of them. Weights that it has
            in int8 are saved in the dtype of the others.
        end_of_turn: Another stop token, which ends a message of the assistant.

    Raises:
        CheckpointError: The folder cannot be written.
        BusyError: Another process is writing it.
    """
    for config in (model.config, model.generation_config):
        for name in _SPECIAL_TOKENS if tokenizer is not None else ():
            ours, theirs = getattr(config, name), getattr(tokenizer, name)
            is_valid = theirs is not None and theirs < model.config.vocab_size
            if is_valid and not (isinstance(ours, list) and theirs in ours):
                setattr(config, name, theirs)
    if end_of_turn is not None:
        model.generation_config.eos_token_id = stop_token_ids(model, end_of_turn)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # sampling options without do_sample, as in some old folders
        model.generation_config.do_sample = True
    whole = plain_state(model) if weights is None else weights
    with hide_progress_bars():
        write_folder(
            folder,
            lambda temporary: model.save_pretrained(temporary, state_dict=whole),
            _add_old_rope_names,
            *([] if tokenizer is None else [partial(_save_readable, tokenizer)]),
        )


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Keep the progress bars of transformers, one for each file of weights, off the terminal."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def stop_token_ids(model: "LlamaForCausalLM", *more: int | None) -> list[int] | int | None:
    """Merge the model's stop tokens with others: a sorted list, one id, or None."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), *more} - {None}
    return sorted(found) if len(found) > 1 else next(iter(found), None)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer as a folder, atomically.

    Raises:
        CheckpointError: The folder cannot be written.
        BusyError: Another process is writing it.
    """
    write_folder(folder, tokenizer.save_pretrained)


def _save_readable(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer with names in tokenizer_config.json that transformers 4 and 5 know.

    transformers 5 writes its new name of the class, and a list where 4 expects a mapping.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_old_rope_names(folder: Path) -> None:
    """Add the names `rope_theta`, `rope_scaling` and `torch_dtype` to config.json.

    Gemma 3 has a RoPE for each type of attention; the sliding one had `rope_local_base_freq`.
    """
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    rotation = dict(content["rope_parameters"])
    if "full_attention" in rotation:
        content["rope_local_base_freq"] = rotation["sliding_attention"]["rope_theta"]
        rotation = dict(rotation["full_attention"])
    content["rope_theta"] = rotation.pop("rope_theta")
    if (share := rotation.get("partial_rotary_factor", 1.0)) != 1.0:
        content["partial_rotary_factor"] = share
    content["rope_scaling"] = rotation if rotation["rope_type"] != "default" else None
    content["torch_dtype"] = content["dtype"]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
