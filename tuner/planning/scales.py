"""The scales of a plan: turned in a search, joined from two plans into a mixed one, and in words.

Adam wants a smaller scale than folded matrices do, and q and k at level 0 another than the rest
(docs/log.md).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from foam_lightning.model.roles import ROLES, role_of
from foam_lightning.plan import FoldPlan

_APART = ("q", "k")
# At level 0, q and k want about this many times the scale of the rest (docs/log.md).
ADAM_QK_FACTOR = 2.5


def scale_plan(
    plan: FoldPlan, *, lr_factor: float = 1.0, scale_factor: float = 1.0, qk_factor: float = 1.0
) -> FoldPlan:
    """Turn the learning rate and the scales of a plan.

    Args:
        plan: The plan.
        lr_factor: Multiplies the learning rate, above 0; so the step of every parameter.
        scale_factor: Multiplies the scale of every matrix, above 0.
        qk_factor: Multiplies that of q and k beside it, above 0.
    """
    return replace(
        plan,
        lr=round_to_three_digits(plan.lr * lr_factor),
        scales={
            name: round_to_three_digits(
                scale * scale_factor * (qk_factor if role_of(name) in _APART else 1.0)
            )
            for name, scale in plan.scales.items()
        },
    )


def combine_plans(levels: Mapping[str, int], *, unfolded: FoldPlan, folded: FoldPlan) -> FoldPlan:
    """Join two plans into a mixed one, in which each matrix takes steps of the size it had there.

    Args:
        levels: The levels of the mixed plan, of the matrices of both.
        unfolded: What those at level 0 take their steps from, but for q and k, which want about
            the steps of folded ones there too, and of which short runs of Adam say too little
            (docs/log.md).
        folded: What the others take theirs from; it gives the learning rate and the memory options
            too.
    """
    ratio = unfolded.lr / folded.lr
    scales = {
        name: (
            folded.scales[name]
            if level or role_of(name) in _APART
            else round_to_three_digits(unfolded.scales[name] * ratio)
        )
        for name, level in levels.items()
    }
    return replace(folded, levels=levels, scales=scales)


def scale_rows(plan: FoldPlan) -> list[list[str]]:
    """Give the scales as text, one row for each level in use.

    Args:
        plan: The plan.

    Returns:
        Rows of the level and a cell for each of `ROLES`; none if a single scale says it all.
    """
    if len(set(plan.scales.values())) < 2:
        return []
    return [
        [str(level), *(cells.get(role, "-") for role in ROLES)]
        for level, cells in _cells(plan).items()
    ]


def describe_scales(plan: FoldPlan) -> str:
    """Say the scales in one line: "0.25", or "level 0: 0.1 (q, k: 0.25); level 2: 0.25"."""
    by_level = {level: _level_in_words(cells) for level, cells in _cells(plan).items()}
    if len(set(by_level.values())) == 1:
        return next(iter(by_level.values()))
    return "; ".join(f"level {level}: {words}" for level, words in by_level.items())


def round_to_three_digits(value: float) -> float:
    """Keep three digits: a plan is read by people, and more are noise."""
    return float(f"{value:.3g}")


def _level_in_words(cells: Mapping[str, str]) -> str:
    ((usual, _), *others) = Counter(cells.values()).most_common()
    apart = [
        f"{', '.join(role for role in cells if cells[role] == scale)}: {scale}"
        for scale, _ in others
    ]
    return f"{usual} ({'; '.join(apart)})" if apart else usual


def _cells(plan: FoldPlan) -> dict[int, dict[str, str]]:
    """Sort the scales by level, lowest first, and role; one cell lists all that are there."""
    found: dict[int, dict[str, set[float]]] = {}
    for name, level in plan.levels.items():
        found.setdefault(level, {}).setdefault(role_of(name), set()).add(plan.scales[name])
    return {
        level: {
            role: ", ".join(f"{scale:g}" for scale in sorted(scales))
            for role, scales in by_role.items()
        }
        for level, by_role in sorted(found.items())
    }
