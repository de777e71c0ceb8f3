"""Rotary position embeddings: which settings of a model folder can be trained, and how far."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

# Settings that mean the same whatever the type is.
_UNTYPED = {"rope_theta", "partial_rotary_factor"}
# Their frequencies depend on the length of a sequence, or on the length that the model declares.
_BY_LENGTH = ("dynamic", "longrope", "yarn")


def check_scaling(content: Mapping[str, Any]) -> None:
    """Check how a config.json scales its rotary embeddings; transformers ignores what it lacks.

    Args:
        content: The config.json, as it was read.

    Raises:
        ValueError: A scaling is no mapping, has no type or an unknown one, or a number that is not
            above zero.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    for name, scaling in _scalings(content):
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind is None and scaling.keys() - _UNTYPED:
            raise ValueError(
                f"{name} {dict(scaling)} has no rope_type; add one of {', '.join(known)}, or "
                f"remove {name}"
            )
        if kind is not None and kind not in known:
            raise ValueError(f"{name} has the rope_type {kind!r}; known are {', '.join(known)}")
        for key in ("factor", "rope_theta"):
            number = scaling.get(key, 1.0)
            is_number = isinstance(number, int | float) and math.isfinite(number)
            if number is not None and not (is_number and number > 0):
                raise ValueError(f"the {key} of {name} must be a number above 0, got {number!r}")


def check_factors(config: "LlamaConfig") -> None:
    """Check that longrope has a factor for every frequency; torch would spread a single one.

    Raises:
        ValueError: It has another number of them.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for scaling in _parts(config.rope_parameters or {}):
        wanted = int(size * scaling.get("partial_rotary_factor", 1.0)) // 2
        for key in ("short_factor", "long_factor"):
            factors = scaling.get(key)
            if factors is not None and len(factors) != wanted:
                raise ValueError(
                    f"the {key} of RoPE has {len(factors)} numbers, the model {wanted}"
                )


def check_rope_length(config: "LlamaConfig", length: int) -> None:
    """Check that rows are no longer than a scaling allows that depends on the declared length.

    Raises:
        ConfigError: They are longer than `max_position_embeddings`.
    """
    declared = config.max_position_embeddings
    for scaling in _parts(config.rope_parameters or {}):
        kind = scaling.get("rope_type")
        if kind in _BY_LENGTH and length > declared:
            raise ConfigError(
                f"rows of {length} tokens exceed the {declared} positions "
                f"(max_position_embeddings) of a model with {kind} RoPE, which depends on them; "
                f"set data.sequence_length to {declared} or less"
            )


def fix_dynamic_frequencies(model: "LlamaForCausalLM") -> None:
    """Keep dynamic RoPE at the frequencies of rows within the declared length, in place.

    Up to there they are constant, but transformers reads the positions of every batch to see that,
    for which a GPU waits and which fake tensors do not have.
    """
    rope: Any = model.model.rotary_emb
    if isinstance(rope.rope_type, dict):  # by type of layer
        kinds = rope.rope_type.items()
        rope.rope_type = {name: "default" if kind == "dynamic" else kind for name, kind in kinds}
    elif rope.rope_type == "dynamic":
        rope.rope_type = "default"


def restore_rope_float32(model: "LlamaForCausalLM") -> None:
    """Recompute the rotary frequencies in float32 after the whole model was cast.

    A bfloat16 run casts every buffer. Rounded frequencies are off by up to 0.4 %, and the error of
    the angles grows with the position.
    """
    rope = model.model.rotary_emb
    cast = [name for name, buffer in rope.named_buffers() if buffer.dtype != torch.float32]
    if not cast:
        return
    with rope.get_buffer(cast[0]).device:
        fresh = type(rope)(rope.config)
    for name in cast:
        setattr(rope, name, fresh.get_buffer(name).float())


def _scalings(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the settings of RoPE by their name, those of each type of layer where they differ."""
    for name in ("rope_scaling", "rope_parameters"):
        scaling = content.get(name)
        if scaling is not None and not isinstance(scaling, Mapping):
            raise ValueError(f"{name} must be a mapping or null, got {scaling!r}")
        if scaling:
            yield from ((name, part) for part in _parts(scaling))


def _parts(scaling: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of each type of layer, or those of all."""
    return [part for part in scaling.values() if isinstance(part, Mapping)] or [scaling]
