"""A local Hugging Face folder to start from: what it holds, whether it is whole, its weights."""

import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.errors import CheckpointError, first_line
from foam_lightning.model import llama
from foam_lightning.model.llama import (
    CLASSES,
    class_of,
    lay_out,
    without_mask,
    without_progress_bars,
)
from foam_lightning.settings import ModelSettings
from foam_lightning.storage.paths import is_file
from foam_lightning.validation import MODEL, check_ranges

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


# Where transformers looks for weights, in this order; an index names files with a part each.
_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_PREFIX = "model."  # which weights of a model without its head lack
_RECOMPUTED = "rotary_emb.inv_freq"  # a buffer that old folders hold

Shape = tuple[int, ...]


def read_config(folder: str) -> "LlamaConfig":
    """Read the configuration of a local Hugging Face folder: LLaMA, Mistral or Qwen2.

    Raises:
        CheckpointError: There is no such folder, no readable `config.json`, it is of another
            architecture, or it asks for code of its own.
    """
    file = Path(folder, "config.json")
    if not is_file(file):
        raise CheckpointError(
            f"{folder} has no config.json; pass a local Hugging Face LLaMA folder"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {first_line(error)}") from error
    return as_config(content, str(file))


def as_config(content: Any, place: str) -> "LlamaConfig":
    """Make a configuration of what a config.json or a checkpoint says, and of nothing else.

    Args:
        content: JSON.
        place: What to call it in an error.

    Raises:
        CheckpointError: It is of another architecture, asks for code of its own, is of quantised
            weights, or its sizes make no model.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {place}: it is no JSON object")
    if "auto_map" in content:
        raise CheckpointError(
            f"{place} asks for code of its own (auto_map in it), which is always refused; pass a "
            f"folder of {_known()} that needs none"
        )
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CLASSES:
        raise CheckpointError(f"{place} holds a {model_type} model; only {_known()} are supported")
    if content.get("quantization_config") is not None:
        raise CheckpointError(
            f"{place} is of quantised weights, which do not train; pass the folder they came from"
        )
    # An implementation of attention may be the name of compiled code on the Hub; `model` says ours.
    plain = {key: value for key, value in content.items() if "implementation" not in key}
    kind: Any = CONFIG_MAPPING[model_type]
    try:
        config: LlamaConfig = kind.from_dict(plain)
        sizes = {name: getattr(config, name) for name in MODEL if hasattr(config, name)}
        check_ranges("", sizes, MODEL)
    except Exception as error:  # whatever checks of sizes and types raise
        raise CheckpointError(f"cannot read {place}: {first_line(error)}") from error
    return config


def check_weights(folder: str) -> None:
    """Refuse a folder whose weights `load` would refuse, by names and shapes alone.

    The heads of the files are read, and no weight.

    Raises:
        CheckpointError: As for `load`.
    """
    with torch.device("meta"):
        model = lay_out(read_config(folder))
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found: dict[str, Shape] = {}
    for file in _files_of(Path(folder)):
        try:
            found |= {_full(name, wanted): shape for name, shape in _shapes_in(file)}
        except Exception as error:  # safetensors and torch raise anything on a damaged file
            raise CheckpointError(
                f"cannot load the weights in {folder}: {file.name} is missing, truncated or "
                f"damaged ({type(error).__name__}); take the whole folder again"
            ) from error
    _refuse(
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
            if not name.endswith(_RECOMPUTED)
        ],
    )


def load(folder: str) -> "LlamaForCausalLM":
    """Load the weights of a local Hugging Face folder, in the default dtype.

    Raises:
        CheckpointError: The folder is none that `read_config` reads, or its weights are missing or
            do not fit it.
    """
    from safetensors import SafetensorError

    config = read_config(folder)
    try:
        with without_progress_bars():
            loaded: Any = class_of(config).from_pretrained(
                folder,
                config=config,
                dtype=torch.get_default_dtype(),
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load the weights in {folder}: {first_line(error)}"
        ) from error
    model, report = loaded
    _refuse(
        folder,
        missing=report["missing_keys"],
        mismatched=report["mismatched_keys"],
        unexpected=report["unexpected_keys"],
    )
    return without_mask(model)


def _refuse(
    folder: str,
    *,
    missing: Collection[str],
    mismatched: Collection[tuple[str, Shape, Shape]],
    unexpected: Collection[str],
) -> None:
    """Refuse weights that are not those of the model, if there are any such."""
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights, the first is {min(missing)}; take the whole "
            "folder, with the config.json that belongs to its weights"
        )
    if mismatched:
        name, found, wanted = min(mismatched)
        raise CheckpointError(
            f"{folder} has {name} of shape {tuple(found)}, its config.json asks for "
            f"{tuple(wanted)}; take the config.json that belongs to its weights"
        )
    if unexpected:
        raise CheckpointError(
            f"{folder} has {len(unexpected)} weights that its config.json has no place for, the "
            f"first is {min(unexpected)}; take the config.json that belongs to its weights"
        )


def _files_of(folder: Path) -> list[Path]:
    """List the files of the weights, those too that an index names and that are not there."""
    for file in (folder / name for name in _FILES):
        if not is_file(file):
            continue
        if file.suffix != ".json":
            return [file]
        try:
            parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(parts))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"cannot read {file} ({type(error).__name__}); take the whole folder again"
            ) from error
    raise CheckpointError(
        f"cannot load the weights in {folder}: there is no {_FILES[0]} nor another of "
        f"{', '.join(_FILES[1:])}; take the whole folder"
    )


def _shapes_in(file: Path) -> Iterator[tuple[str, Shape]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, tuple(opened.get_slice(name).get_shape())
        return
    is_zip = zipfile.is_zipfile(file)  # of torch 1.6 and later; others cannot be mapped
    content = torch.load(file, map_location="meta", weights_only=True, mmap=is_zip)
    yield from ((name, tuple(weight.shape)) for name, weight in content.items())


def _full(name: str, wanted: Mapping[str, Shape]) -> str:
    return _PREFIX + name if _PREFIX + name in wanted else name


def _known() -> str:
    *others, last = CLASSES
    return f"{', '.join(others)} and {last}"


def model_config(settings: ModelSettings, architecture: Mapping[str, Any] | None) -> "LlamaConfig":
    """Describe the model that settings ask for.

    Args:
        settings: The sizes, or the pretrained folder that has them.
        architecture: What a checkpoint saved of that folder; replaces it.

    Raises:
        ConfigError: The sizes make no model.
        CheckpointError: The folder, or what a checkpoint kept of one, holds none that is known.
    """
    if architecture is not None:
        config = architecture.get("config") if isinstance(architecture, Mapping) else None
        return as_config(config, "the architecture in the checkpoint's hyper_parameters")
    if settings.pretrained is not None:
        return read_config(settings.pretrained)
    return llama.describe(
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
    """Make the model that settings ask for, with pretrained or random weights.

    Args:
        settings: The sizes, or the pretrained folder.
        architecture: As for `model_config`; the weights are then random, and those of the
            checkpoint are to be loaded.
        seed: Seeds random weights.

    Raises:
        ConfigError: The sizes make no model.
        CheckpointError: The folder holds none that is known, or its weights do not fit it.
    """
    from transformers import GenerationConfig

    if settings.pretrained is not None and architecture is None:
        return load(settings.pretrained)
    model = llama.build(model_config(settings, architecture), seed=seed)
    if architecture is not None:
        generation = dict(architecture["generation_config"])
        model.generation_config = GenerationConfig.from_dict(generation)
    return model


def architecture_to_json(model: "LlamaForCausalLM") -> dict[str, Any]:
    """Write down, as JSON values, what a checkpoint needs of its model besides weights."""
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation_config": json.loads(model.generation_config.to_json_string(use_diff=False)),
    }
