"""LLaMA through transformers: describe, build and save it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.errors import ConfigError
from foam_lightning.storage.atomic import write_folder
from foam_lightning.validation import MODEL, check_ranges

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

# Causal attention without a mask, under a name of our own. Under "sdpa" transformers looks at the
# values of a mask it makes for every forward pass to find that it is not needed: a GPU waits for
# that, and fake tensors have no values, so an account of them would keep masks that no run makes.
_ATTENTION = "sdpa_causal"
# The architectures that are built of the same parts under the same names, by what config.json calls
# them. A type that says LLaMA below stands for any of them.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
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
        ConfigError: A size is out of range, or the heads do not divide what they must.
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
    # Special tokens are the tokenizer's to say: `save` asks it.
    return LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)


def with_depth(config: "LlamaConfig", num_layers: int) -> "LlamaConfig":
    """Give the configuration another number of layers, in place."""
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):  # one for each
        config.layer_types = config.layer_types[:num_layers]
    return config


def check_length(config: "LlamaConfig", length: int) -> None:
    """Refuse rows that are longer than what attention sees.

    There is no mask here for a sliding window (Mistral 7B v0.1 has one of 4096 tokens). Within it
    a row needs none.

    Raises:
        ConfigError: They are.
    """
    window: int | None = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"])
    if slides and window is not None and length > window:
        raise ConfigError(
            f"rows of {length} tokens are longer than the window of {window} that attention of "
            f"this model has (sliding_window); set data.sequence_length to {window} or less"
        )


def fingerprint(config: "LlamaConfig") -> dict[str, int | bool]:
    """List the sizes that a fold plan must agree with, in the order they are compared."""
    return {name: getattr(config, name) for name in _FINGERPRINT}


def lay_out(config: "LlamaConfig") -> "LlamaForCausalLM":
    """Make the model wherever tensors are made now: under the meta device or in fake mode.

    The weights are not meant to be used; `build` draws them.
    """
    return without_mask(class_of(config)(config))


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


def without_mask(model: "LlamaForCausalLM") -> "LlamaForCausalLM":
    """Let the attention of a model be causal without a mask, in place."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    model.set_attn_implementation(_ATTENTION)
    return model


def class_of(config: "LlamaConfig") -> Any:
    """Find the class of transformers that a configuration is of."""
    import transformers

    return getattr(transformers, CLASSES[config.model_type])


def save(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    *,
    end_of_turn: int | None = None,
) -> None:
    """Write a Hugging Face folder beside `folder` and rename it, so that no half one is ever seen.

    The model's special tokens become the tokenizer's, so that whoever loads it stops at the right
    one; where the model names several and the tokenizer's is among them, they stay, and so do those
    for which the tokenizer has none that the model knows. Tied weights are written once. Rotation
    is also described as before transformers 5, for older readers. Of several processes that train
    together the first alone writes.

    Args:
        model: Says what it is, and has the weights where they are not given.
        tokenizer: Goes with it.
        folder: Replaced if it exists.
        weights: Whole, by name, where the model has but a share of them.
        end_of_turn: Another token to stop at, which ends what the assistant says.

    Raises:
        CheckpointError: The folder cannot be written.
        BusyError: Another process is writing it.
    """
    for config in (model.config, model.generation_config):
        for name in _SPECIAL_TOKENS:
            ours, theirs = getattr(config, name), getattr(tokenizer, name)
            known = theirs is not None and theirs < model.config.vocab_size
            if known and not (isinstance(ours, list) and theirs in ours):
                setattr(config, name, theirs)
    if end_of_turn is not None:
        model.generation_config.eos_token_id = ends(model, end_of_turn)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # sampling is described and not switched on, as in some old folders
        model.generation_config.do_sample = True
    with without_progress_bars():
        write_folder(
            folder,
            lambda beside: model.save_pretrained(beside, state_dict=weights),
            _describe_rotation_twice,
            tokenizer.save_pretrained,
        )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep the progress bars of transformers, one for each file of weights, off the terminal."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def ends(model: "LlamaForCausalLM", *more: int | None) -> list[int] | int | None:
    """List the tokens that a model stops at, and more; a single one is no list."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), *more} - {None}
    return sorted(found) if len(found) > 1 else next(iter(found), None)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer alone in the same way.

    Raises:
        CheckpointError: The folder cannot be written.
        BusyError: Another process is writing it.
    """
    write_folder(folder, tokenizer.save_pretrained)


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


def _describe_rotation_twice(folder: Path) -> None:
    """Add the names `rope_theta`, `rope_scaling` and `torch_dtype` to config.json."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    rotation = dict(content["rope_parameters"])
    content["rope_theta"] = rotation.pop("rope_theta")
    content["rope_scaling"] = rotation if rotation["rope_type"] != "default" else None
    content["torch_dtype"] = content["dtype"]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
