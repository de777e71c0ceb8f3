"""The scales of a plan: changed in a search, combined from two plans into a mixed one, as text.

The best scale of unfolded matrices is smaller than that of folded ones, and at level 0 that of q
and k differs from the rest (docs/log.md).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from foam_lightning.model.roles import role_of, roles_of
from foam_lightning.plan import FoldPlan

_QK = ("q", "k")
# At level 0 the best scale of q and k is about this many times that of the rest (docs/log.md).
ADAM_QK_FACTOR = 2.5


def scale_plan(
    plan: FoldPlan, *, lr_factor: float = 1.0, scale_factor: float = 1.0, qk_factor: float = 1.0
) -> FoldPlan:
    """Multiply the learning rate and the scales of a plan; all factors are above 0.

    Args:
        plan: The plan.
        lr_factor: Factor of the learning rate, and so of the step of every parameter.
        scale_factor: Factor of the scale of every matrix.
        qk_factor: Further factor of the scales of q and k.
    """
    return replace(
        plan,
        lr=round_to_three_digits(plan.lr * lr_factor),
        scales={
            name: round_to_three_digits(
                scale * scale_factor * (qk_factor if role_of(name) in _QK else 1.0)
            )
            for name, scale in plan.scales.items()
        },
    )


def combine_plans(levels: Mapping[str, int], *, unfolded: FoldPlan, folded: FoldPlan) -> FoldPlan:
    """Combine two plans into a mixed one in which the steps of each matrix keep their size.

    Args:
        levels: The levels of the mixed plan, for the matrices of both plans.
        unfolded: Sets the steps of matrices at level 0 except q and k. Those work with the steps of
            folded ones, and short runs of Adam say too little about them (docs/log.md).
        folded: Sets the steps of all other matrices, the learning rate and the memory options.
    """
    ratio = unfolded.lr / folded.lr
    scales = {
        name: (
            folded.scales[name]
            if level or role_of(name) in _QK
            else round_to_three_digits(unfolded.scales[name] * ratio)
        )
        for name, level in levels.items()
    }
    return replace(folded, levels=levels, scales=scales)


def scale_rows(plan: FoldPlan) -> list[list[str]]:
    """Return the scales as text, one row for each level in use.

    Args:
        plan: The plan.

    Returns:
        Rows of the level and a cell for each of `roles_of(plan.scales)`; none if all are equal.
    """
    if len(set(plan.scales.values())) < 2:
        return []
    roles = roles_of(plan.scales)
    return [
        [str(level), *(cells.get(role, "-") for role in roles)]
        for level, cells in _cells(plan).items()
    ]


def describe_scales(plan: FoldPlan) -> str:
    """Describe the scales in a line: "0.25", or "level 0: 0.1 (q, k: 0.25); level 2: 0.25"."""
    by_level = {level: _describe_level(cells) for level, cells in _cells(plan).items()}
    if len(set(by_level.values())) == 1:
        return next(iter(by_level.values()))
    return "; ".join(f"level {level}: {text}" for level, text in by_level.items())


def round_to_three_digits(value: float) -> float:
    """Round to three significant digits; more would be noise to the reader of a plan."""
    return float(f"{value:.3g}")


def _describe_level(cells: Mapping[str, str]) -> str:
    ((usual, _), *others) = Counter(cells.values()).most_common()
    exceptions = [
        f"{', '.join(role for role in cells if cells[role] == scale)}: {scale}"
        for scale, _ in others
    ]
    return f"{usual} ({'; '.join(exceptions)})" if exceptions else usual


def _cells(plan: FoldPlan) -> dict[int, dict[str, str]]:
    """Group the scales by level, lowest first, and role; a cell lists all distinct ones."""
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
