"""Scales: the factor on the learning rate by level, so that the levels of one plan go together."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from foam_lightning.roles import role_of

ScaleRule = Literal["per_level", "equal_rms"]
RmsByRole = Mapping[str, Mapping[int, float]]


def per_level(levels: Iterable[int], *, unfolded: float, folded: float) -> dict[int, float]:
    """Give level 0 one scale and every other level another.

    Args:
        levels: The levels in use.
        unfolded: The scale that suits Adam.
        folded: The scale of a uniform folded plan.
    """
    return {level: folded if level else unfolded for level in sorted(set(levels))}


def equal_rms(
    levels: Iterable[int], *, target: float, rms: Mapping[int, float]
) -> dict[int, float]:
    """Give every level the scale at which its update has the same RMS, so `target / rms[level]`.

    Args:
        levels: The levels in use, all of them in `rms`.
        target: RMS of the update after the scale and before the learning rate, above 0.
        rms: RMS of the update before the scale, by level; all above 0.
    """
    return {level: rounded(target / rms[level]) for level in sorted(set(levels))}


def rms_by_level(by_role: RmsByRole, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, float]:
    """Average the RMS of the update over roles: that of all elements of all matrices.

    Args:
        by_role: RMS by role and level, as the probe measures it; the roles share their levels.
        shapes: The matrices that fold, by qualified name.

    Returns:
        By level; empty unless every figure is a number above 0.
    """
    counts = Counter[str]()
    for name, shape in shapes.items():
        counts[role_of(name)] += math.prod(shape)
    if not by_role or by_role.keys() != counts.keys():
        return {}
    rms = {
        level: math.sqrt(
            sum(count * by_role[role][level] ** 2 for role, count in counts.items())
            / counts.total()
        )
        for level in next(iter(by_role.values()))
    }
    return rms if all(0 < value < math.inf for value in rms.values()) else {}


def scales_in_words(asked: ScaleRule, *, measured: bool) -> str:
    """Say in one sentence how the scales of mixed plans came about.

    Args:
        asked: The rule of the settings.
        measured: Whether the RMS of the update is known.
    """
    if asked == "per_level":
        return (
            "Nothing rests on it: scales are per level (tune.scales), one for Adam and one for "
            "folded matrices."
        )
    if measured:
        return (
            "The scales of a mixed plan equalise it over its levels (tune.scales), at that of the "
            "best uniform plan."
        )
    return "So scales are per level, though tune.scales asks for equal_rms."


def rounded(value: float) -> float:
    """Keep three digits: a plan is read by people, and more are noise."""
    return float(f"{value:.3g}")
