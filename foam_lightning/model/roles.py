"""Role (q, k, v, ...) and layer of a LLaMA parameter, read from its qualified name.

Not to be confused with the roles of a conversation in `data.chat`.
"""

import re
from collections.abc import Iterable

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven matrices of a LLaMA layer, in the order of the forward pass."""

ALL_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
"""Also those of Phi-3, which has some of the seven in one matrix."""

_ROLE = re.compile(rf"(?:^|\.)({'|'.join(ALL_ROLES)})_proj(?:\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)(?:\.|$)")


def role_of(name: str) -> str:
    """Return the role of a parameter: "model.layers.3.mlp.down_proj.weight" -> "down".

    Args:
        name: The qualified name, as `named_parameters()` gives it.

    Returns:
        One of `ROLES`, "qkv" or "gate_up" for those matrices in one, or "other" for embeddings,
        head, norms and unknown names.
    """
    match = _ROLE.search(name)
    return match[1] if match else "other"


def roles_of(names: Iterable[str]) -> list[str]:
    """List the roles of matrices, in the order of the forward pass, without "other".

    Args:
        names: Their qualified names.
    """
    return sorted({role_of(name) for name in names} - {"other"}, key=ALL_ROLES.index)


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter: "model.layers.3.mlp.down_proj.weight" -> 3.

    Args:
        name: The qualified name, as `named_parameters()` gives it.

    Returns:
        The index of the layer, from 0, or None for parameters outside the layers.
    """
    match = _LAYER.search(name)
    return int(match[1]) if match else None
