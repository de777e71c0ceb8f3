"""Create a model from settings, or from a local Hugging Face folder, which is checked first."""

import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.errors import CheckpointError, first_line
from foam_lightning.model import llama
from foam_lightning.model.llama import (
    MODEL_CLASSES,
    create_uninitialized,
    hide_progress_bars,
    model_class,
    use_causal_attention,
)
from foam_lightning.model.rope import check_factors, check_scaling
from foam_lightning.settings import ModelSettings
from foam_lightning.storage.paths import is_file
from foam_lightning.validation import MODEL, check_ranges

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


# Files in which transformers looks for weights, in this order; an index lists several files.
_WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# What attention without masks and the loss do not compute: capped scores and logits, as in Gemma 2,
# and attention to later tokens.
_UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
_PREFIX = "model."  # absent from names saved by a model without its head
_IGNORED_BUFFER = "rotary_emb.inv_freq"  # in old folders; recomputed

Shape = tuple[int, ...]


def model_config(settings: ModelSettings, architecture: Mapping[str, Any] | None) -> "LlamaConfig":
    """Create the configuration of the model that settings ask for.

    Args:
        settings: The sizes, or the pretrained folder that has them.
        architecture: What a checkpoint saved of that folder; replaces it.

    Raises:
        ConfigError: The sizes are invalid.
        CheckpointError: The folder or the architecture is unreadable or not supported.
    """
    if architecture is not None:
        config = architecture.get("config") if isinstance(architecture, Mapping) else None
        return parse_config(config, "the architecture in the checkpoint's hyper_parameters")
    if settings.pretrained is not None:
        return read_config(settings.pretrained)
    return llama.create_config(
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        vocab_size=settings.vocab_size,
        max_position_embeddings=settings.max_position_embeddings,
    )


def create_model(
    settings: ModelSettings, architecture: Mapping[str, Any] | None, *, seed: int
) -> "LlamaForCausalLM":
    """Create the model that settings ask for, with pretrained or random weights.

    Args:
        settings: The sizes, or the pretrained folder.
        architecture: As for `model_config`; the weights are then random, and those of the
            checkpoint are to be loaded.
        seed: Seeds random weights.

    Raises:
        ConfigError: The sizes are invalid.
        CheckpointError: As for `load_pretrained`.
    """
    from transformers import GenerationConfig

    if settings.pretrained is not None and architecture is None:
        return load_pretrained(settings.pretrained)
    model = llama.create_initialized(model_config(settings, architecture), seed=seed)
    if architecture is not None:
        generation = dict(architecture["generation_config"])
        model.generation_config = GenerationConfig.from_dict(generation)
    return model


def architecture_to_json(model: "LlamaForCausalLM") -> dict[str, Any]:
    """Return, as JSON values, what a checkpoint stores of its model besides weights."""
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation_config": json.loads(model.generation_config.to_json_string(use_diff=False)),
    }


def read_config(folder: str) -> "LlamaConfig":
    """Read the configuration of a local Hugging Face folder of one of the `MODEL_CLASSES`.

    Raises:
        CheckpointError: `config.json` is missing, unreadable, of another architecture, or needs
            custom code.
    """
    file = Path(folder, "config.json")
    if not is_file(file):
        raise CheckpointError(
            f"{folder} has no config.json; pass a local Hugging Face folder of a LLaMA model"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {first_line(error)}") from error
    return parse_config(content, str(file))


def parse_config(content: Any, source: str) -> "LlamaConfig":
    """Parse the content of a config.json or of a checkpoint's architecture.

    Args:
        content: JSON.
        source: Its name in errors.

    Raises:
        CheckpointError: The architecture is not supported, it needs custom code, its weights are
            quantised, its attention or logits are computed otherwise, or its sizes are invalid.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {source}: not a JSON object")
    if "auto_map" in content:
        raise CheckpointError(
            f"{source} needs custom code (auto_map), which is never run; pass a folder of "
            f"{_supported()} without it"
        )
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_CLASSES:
        raise CheckpointError(f"{source} is a {model_type} model; supported are {_supported()}")
    if content.get("quantization_config") is not None:
        raise CheckpointError(
            f"{source} has quantised weights, which cannot be trained; pass the unquantised model"
        )
    # The name of an attention implementation may load compiled code from the Hub.
    plain = {key: value for key, value in content.items() if "implementation" not in key}
    config_class: Any = CONFIG_MAPPING[model_type]
    try:
        check_scaling(content)
        config: LlamaConfig = config_class.from_dict(plain)
        sizes = {name: getattr(config, name) for name in MODEL if hasattr(config, name)}
        check_ranges("", sizes, MODEL)
        check_factors(config)
    except Exception as error:  # validation in transformers raises many types
        raise CheckpointError(f"cannot read {source}: {first_line(error)}") from error
    for name in _UNSUPPORTED:
        if getattr(config, name, None):
            raise CheckpointError(
                f"{source} sets {name} {getattr(config, name)}, which is not supported; supported "
                f"are {_supported()} without it"
            )
    return config


def check_weights(folder: str) -> None:
    """Check names and shapes of the weights in a folder, as `load_pretrained` does.

    Reads only the headers of the files.

    Raises:
        CheckpointError: As for `load_pretrained`.
    """
    with torch.device("meta"):
        model = create_uninitialized(read_config(folder))
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found: dict[str, Shape] = {}
    for file in _weight_files(Path(folder)):
        try:
            found |= {_full_name(name, wanted): shape for name, shape in _read_shapes(file)}
        except Exception as error:  # damaged files raise many types
            raise CheckpointError(
                f"cannot load the weights in {folder}: {file.name} is missing, truncated or "
                f"damaged ({type(error).__name__}); copy the folder again"
            ) from error
    _check_match(
        folder,
        missing=wanted.keys() - found.keys(),
        mismatched=[
            (name, found[name], shape)
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ],
        unexpected=[
            name
            for name in found.keys() - model.state_dict().keys()
            if not name.endswith(_IGNORED_BUFFER)
        ],
    )


def load_pretrained(folder: str) -> "LlamaForCausalLM":
    """Load the weights of a local Hugging Face folder, in the default dtype.

    Raises:
        CheckpointError: As for `read_config`, or weights are missing or do not match the
            configuration.
    """
    from safetensors import SafetensorError

    config = read_config(folder)
    try:
        with hide_progress_bars():
            loaded: Any = model_class(config).from_pretrained(
                folder,
                config=config,
                dtype=torch.get_default_dtype(),
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported, and checked below
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load the weights in {folder}: {first_line(error)}"
        ) from error
    model, report = loaded
    _check_match(
        folder,
        missing=report["missing_keys"],
        mismatched=report["mismatched_keys"],
        unexpected=report["unexpected_keys"],
    )
    return use_causal_attention(model)


def _check_match(
    folder: str,
    *,
    missing: Collection[str],
    mismatched: Collection[tuple[str, Shape, Shape]],
    unexpected: Collection[str],
) -> None:
    """Check that the weights in a folder are exactly those of the model."""
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights, the first is {min(missing)}; copy the whole "
            "folder, with the config.json of these weights"
        )
    if mismatched:
        name, found, wanted = min(mismatched)
        raise CheckpointError(
            f"{folder} has {name} of shape {tuple(found)}, but its config.json needs "
            f"{tuple(wanted)}; use the config.json of these weights"
        )
    if unexpected:
        raise CheckpointError(
            f"{folder} has {len(unexpected)} weights that are not in the model of its config.json, "
            f"the first is {min(unexpected)}; use the config.json of these weights"
        )


def _weight_files(folder: Path) -> list[Path]:
    """List the files of the weights, including missing files that an index names."""
    for file in (folder / name for name in _WEIGHT_FILES):
        if not is_file(file):
            continue
        if file.suffix != ".json":
            return [file]
        try:
            parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(parts))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"cannot read {file} ({type(error).__name__}); copy the folder again"
            ) from error
    raise CheckpointError(
        f"cannot load the weights in {folder}: it has none of {', '.join(_WEIGHT_FILES)}; copy the "
        "whole folder"
    )


def _read_shapes(file: Path) -> Iterator[tuple[str, Shape]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, tuple(opened.get_slice(name).get_shape())
        return
    is_zip = zipfile.is_zipfile(file)  # since torch 1.6; older files cannot be memory-mapped
    content = torch.load(file, map_location="meta", weights_only=True, mmap=is_zip)
    yield from ((name, tuple(weight.shape)) for name, weight in content.items())


def _full_name(name: str, wanted: Mapping[str, Shape]) -> str:
    return _PREFIX + name if _PREFIX + name in wanted else name


def _supported() -> str:
    *others, last = MODEL_CLASSES
    return f"{', '.join(others)} and {last}"
