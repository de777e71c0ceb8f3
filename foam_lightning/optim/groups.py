"""Which parameters fold, and parameter groups with their fold levels for the optimizer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from foam_lightning.settings import DEFAULT_EXCLUDE


def is_foldable(name: str, shape: Sequence[int], exclude: str = DEFAULT_EXCLUDE) -> bool:
    """Return whether the moments of a parameter may be folded.

    Args:
        name: Qualified name, such as "model.layers.0.self_attn.q_proj.weight".
        shape: Shape of the parameter; with fewer than two dimensions it never folds.
        exclude: Regular expression; names that contain a match do not fold.
    """
    return len(shape) >= 2 and re.search(exclude, name) is None


def foldable_shapes(
    named_parameters: Iterable[tuple[str, Tensor]], exclude: str = DEFAULT_EXCLUDE
) -> dict[str, tuple[int, ...]]:
    """Map the name of each parameter that folds to its shape, in the given order.

    Args:
        named_parameters: As from `model.named_parameters()`; frozen ones are left out.
        exclude: Regular expression; names that contain a match do not fold.
    """
    return {
        name: tuple(parameter.shape)
        for name, parameter in named_parameters
        if parameter.requires_grad and is_foldable(name, parameter.shape, exclude)
    }


def param_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    levels: Mapping[str, int],
    scales: Mapping[str, float],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Group the parameters for `FOAM`: one group per level and scale, and one for all others.

    A parameter named in `levels` gets its level, its scale and the weight decay. All others (norms,
    embeddings, head) get level 0, scale 1 and no weight decay. Frozen parameters are left out.

    Args:
        named_parameters: As from `model.named_parameters()`.
        levels: Fold level by qualified name, level 0 included.
        scales: Scale by qualified name, at least for the names in `levels`.
        weight_decay: Decoupled weight decay, 0 or more.

    Returns:
        The groups, sorted by level and scale, and the others last; none is empty. They hold
        (name, parameter) pairs in the given order, so that the optimizer knows the names.

    Raises:
        ValueError: `levels` names an unknown parameter, or one without a scale.
    """
    parameters = dict(named_parameters)
    unknown = [name for name in levels if name not in parameters]
    if unknown:
        raise ValueError(
            f"levels name {len(unknown)} parameters that the model does not have, the first is "
            f"{unknown[0]}; pass levels for this model"
        )
    missing = [name for name in levels if name not in scales]
    if missing:
        raise ValueError(
            f"{len(missing)} parameters have a level but no scale, the first is {missing[0]}; "
            "pass a scale for each"
        )
    folded: dict[tuple[int, float], list[tuple[str, Tensor]]] = {}
    rest = []
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        if name in levels:
            folded.setdefault((levels[name], scales[name]), []).append((name, parameter))
        else:
            rest.append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": pairs, "level": level, "scale": scale, "weight_decay": weight_decay}
        for (level, scale), pairs in sorted(folded.items())
    ]
    if rest:
        groups.append({"params": rest, "level": 0, "scale": 1.0, "weight_decay": 0.0})
    return groups
