"""What a model begins as: sizes, a Hugging Face folder, or what a checkpoint kept of one."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from foam_lightning import model as llama
from foam_lightning import pretrained

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
)


def config_of(settings: Mapping[str, Any]) -> "LlamaConfig":
    """Describe the model that settings ask for.

    Args:
        settings: Sizes, `pretrained` and `architecture`, as `LlamaFoam` takes them.

    Raises:
        ConfigError: The sizes make no model.
        CheckpointError: The folder, or what a checkpoint kept of one, holds none that is known.
    """
    if settings["architecture"] is not None:
        kept = settings["architecture"]
        config = kept.get("config") if isinstance(kept, Mapping) else None
        return pretrained.as_config(config, "the architecture in the checkpoint's hyper_parameters")
    if settings["pretrained"] is not None:
        return pretrained.read_config(settings["pretrained"])
    return llama.describe(**{name: settings[name] for name in _SIZES})


def begin(settings: Mapping[str, Any]) -> "LlamaForCausalLM":
    """Make the model that settings ask for, with the weights of the folder or with drawn ones.

    Args:
        settings: As for `config_of`, and `seed`. With `architecture` weights are drawn, and those
            of a checkpoint are to follow.

    Raises:
        ConfigError: The sizes make no model.
        CheckpointError: The folder holds none that is known, or its weights do not fit it.
    """
    from transformers import GenerationConfig

    kept = settings["architecture"]
    if settings["pretrained"] is not None and kept is None:
        return pretrained.load(settings["pretrained"])
    model = llama.build(config_of(settings), seed=settings["seed"])
    if kept is not None:
        model.generation_config = GenerationConfig.from_dict(dict(kept["generation_config"]))
    return model


def check_beginning(settings: Mapping[str, Any]) -> None:
    """Refuse weights that `begin` would refuse, before they are read.

    Args:
        settings: As for `begin`.

    Raises:
        CheckpointError: The folder holds no model that is known, or its weights do not fit it.
    """
    if settings["pretrained"] is not None and settings["architecture"] is None:
        pretrained.check_weights(settings["pretrained"])


def architecture_of(model: "LlamaForCausalLM") -> dict[str, Any]:
    """Write down, as JSON values, what a checkpoint needs of its model besides weights."""
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation_config": json.loads(model.generation_config.to_json_string(use_diff=False)),
    }
