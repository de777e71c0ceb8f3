"""The search space of mixed plans: a dozen knobs that decode into a fold level for every matrix.

The knobs weight a base curve into a damage table, and the allocation decodes the table into levels
that fill the budget. So every trial fits, and the search has a dozen dimensions, not 200.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from foam_lightning.memory.options import MAX_LEVEL
from foam_lightning.model.roles import ROLES, layer_of, role_of
from foam_lightning.optim.state import state_bytes
from foam_lightning.plan import StateDtype
from tuner.planning.allocation import allocate

if TYPE_CHECKING:
    import optuna

_LARGEST_MULTIPLIER = 8.0
_LARGEST_EXPONENT = 8.0


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """One point of the search space; the defaults treat all matrices alike.

    Args:
        q: Multiplier of the damage to query matrices, above 0.
        k: Multiplier for key matrices.
        v: Multiplier for value matrices.
        o: Multiplier for attention output matrices.
        gate: Multiplier for MLP gate matrices.
        up: Multiplier for MLP up matrices.
        down: Multiplier for MLP down matrices.
        depth_slope: Growth of the log of the damage with the relative depth x in [-1, 1].
        depth_curvature: Growth with x**2 - 1/3, that is from the middle towards both ends.
        exponent: Power of the base curve, above 0. Below 2 the damage is concave in the bytes of
            state, which leads to few matrices at level 0 and the rest high; above 2 it is convex,
            which leads to levels close to each other.
        level_cap: The highest level to use, from 1 to 8, unless the budget needs a higher one.

    Raises:
        ValueError: A knob is out of range.
    """

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0
    o: float = 1.0
    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0
    depth_slope: float = 0.0
    depth_curvature: float = 0.0
    exponent: float = 1.0
    level_cap: int = MAX_LEVEL

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in (*ROLES, "exponent"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.level_cap not in range(1, MAX_LEVEL + 1):
            raise ValueError(f"level_cap must be from 1 to {MAX_LEVEL}, got {self.level_cap}")


def suggest(trial: "optuna.Trial") -> Knobs:
    """Suggest knobs for a trial; this declares the search space.

    Args:
        trial: The trial; its parameters get the names of the knobs.
    """
    steepest = math.log(_LARGEST_MULTIPLIER)
    multipliers = {
        role: trial.suggest_float(role, 1 / _LARGEST_MULTIPLIER, _LARGEST_MULTIPLIER, log=True)
        for role in ROLES
    }
    return Knobs(
        **multipliers,
        depth_slope=trial.suggest_float("depth_slope", -steepest, steepest),
        depth_curvature=trial.suggest_float("depth_curvature", -steepest, steepest),
        exponent=trial.suggest_float("exponent", 1.0, _LARGEST_EXPONENT, log=True),
        level_cap=trial.suggest_int("level_cap", 1, MAX_LEVEL),
    )


def base_curve(level: int) -> float:
    """Return the damage of a level before all weighting: sqrt(1 - 2**-level).

    This is the norm of the residual over the norm of the gradient if adjacent columns are
    independent, which is what was measured for every role (docs/log.md).

    Args:
        level: Fold level, 0 or more.

    Returns:
        From 0 at level 0 towards 1.
    """
    return math.sqrt(1.0 - 2.0**-level)


def damage_table(
    shapes: Mapping[str, tuple[int, ...]], knobs: Knobs, levels: Sequence[int]
) -> NDArray[np.float64]:
    """Estimate the damage of each level to each matrix, in arbitrary units.

    Args:
        shapes: Shapes of the matrices that fold, by parameter name.
        knobs: The weights.
        levels: The levels, one per column.

    Returns:
        Shape (matrices, levels): elements * role * depth * base curve; inf above the level cap.
    """
    curve = np.array([base_curve(level) ** knobs.exponent for level in levels])
    curve[np.array(levels) > knobs.level_cap] = np.inf
    num_layers = 1 + max((layer_of(name) or 0 for name in shapes), default=0)
    weights = [
        math.prod(shape) * _role_weight(name, knobs) * _depth_weight(name, num_layers, knobs)
        for name, shape in shapes.items()
    ]
    table: NDArray[np.float64] = np.multiply.outer(np.array(weights), curve)
    return table


def state_bytes_table(
    shapes: Mapping[str, tuple[int, ...]], levels: Sequence[int], dtype: StateDtype
) -> NDArray[np.int64]:
    """Count the bytes of the state of each matrix at each level.

    Args:
        shapes: Shapes of the matrices that fold, by parameter name.
        levels: The levels, one per column.
        dtype: The dtype of the moments.

    Returns:
        Shape (matrices, levels).
    """
    return np.array(
        [
            [state_bytes(shape, level, getattr(torch, dtype)) for level in levels]
            for shape in shapes.values()
        ],
        dtype=np.int64,
    )


def decode(
    shapes: Mapping[str, tuple[int, ...]],
    knobs: Knobs,
    levels: Sequence[int],
    cost_bytes: NDArray[np.int64],
    budget_bytes: int,
) -> dict[str, int]:
    """Convert knobs to the levels that fit the budget with the least damage.

    A level cap too low for the budget is raised to the lowest that fits, so that any knobs decode
    if any levels fit.

    Args:
        shapes: Shapes of the matrices that fold, by parameter name.
        knobs: The weights.
        levels: The levels to choose from, one column of `cost_bytes` each.
        cost_bytes: Shape (matrices, levels).
        budget_bytes: Limit on the bytes of all levels together.

    Returns:
        The level of each matrix.

    Raises:
        ValueError: No levels fit the budget.
    """
    cap = _affordable_cap(knobs.level_cap, levels, cost_bytes, budget_bytes)
    damage = damage_table(shapes, replace(knobs, level_cap=cap), levels)
    chosen = allocate(cost_bytes, damage, budget_bytes)
    return {name: levels[column] for name, column in zip(shapes, chosen, strict=True)}


def nearest_levels(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, int],
    levels: Sequence[int],
    cost_bytes: NDArray[np.int64],
    budget_bytes: int,
) -> dict[str, int]:
    """Find the levels that fit a budget and differ least from the wanted ones.

    The difference of a matrix is that of its levels times its number of elements. Other arguments,
    result and errors are those of `decode`.
    """
    damage = [
        [math.prod(shape) * abs(level - wanted[name]) for level in levels]
        for name, shape in shapes.items()
    ]
    chosen = allocate(cost_bytes, damage, budget_bytes)
    return {name: levels[column] for name, column in zip(shapes, chosen, strict=True)}


def _affordable_cap(
    cap: int, levels: Sequence[int], cost_bytes: NDArray[np.int64], budget_bytes: int
) -> int:
    for higher in range(cap, MAX_LEVEL):
        allowed = cost_bytes[:, np.array(levels) <= higher]
        if allowed.size and allowed.min(axis=1).sum() <= budget_bytes:
            return higher
    return MAX_LEVEL


# A matrix of several roles takes the multiplier of the first.
_FIRST_ROLES = {"qkv": "q", "gate_up": "gate"}


def _role_weight(name: str, knobs: Knobs) -> float:
    role = _FIRST_ROLES.get(role_of(name), role_of(name))
    return getattr(knobs, role) if role in ROLES else 1.0


def _depth_weight(name: str, num_layers: int, knobs: Knobs) -> float:
    layer = layer_of(name)
    if layer is None or num_layers == 1:
        return 1.0
    x = 2 * layer / (num_layers - 1) - 1
    # The mean of x**2 over [-1, 1] is 1/3, so that curvature does not change the mean log damage.
    return math.exp(knobs.depth_slope * x + knobs.depth_curvature * (x**2 - 1 / 3))
