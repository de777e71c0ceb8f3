"""How long the exact allocation takes at 560 matrices of 9 levels, beside scipy's MILP.

    python -m tests.benchmarks.allocate [--output FILE]

80 layers of 7 matrices with the shapes of LLaMA 70B and their bfloat16 state, budgets from a half
to a sixteenth of Adam's, and damages from those of the search to nearly equal ones. Each
time is the processor time of one solve in this process, so other processes do not count; the least
of three for ours, one solve for MILP, which is stopped after so many nodes of its tree.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from scipy.optimize import (  # type: ignore[import-untyped]
    Bounds,
    LinearConstraint,
    milp,
)

from foam_lightning.memory.levers import MAX_LEVEL
from tests.benchmarks.heading import dated, machine, packages, publish
from tuner.allocate import allocate
from tuner.space import Knobs, damage_table, state_bytes_table

Costs = NDArray[np.int64]
Damages = NDArray[np.float64]

HIDDEN, INTERMEDIATE, KEYS, LAYERS = 8192, 28672, 1024, 80
LEVELS = range(MAX_LEVEL + 1)
# At halves of halves uniform levels fill the budget exactly; between them is harder.
SHARES = (0.5, 0.37, 0.125, 0.06)
REPEATS = 3
# The damages of a plan before any run.
_UNTUNED = Knobs(exponent=4.0)


def shapes_of(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Name the matrices of LLaMA 70B, with so many layers, and their shapes."""
    in_layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(num_layers)
        for name, shape in in_layer.items()
    }


def costs_of(num_layers: int) -> Costs:
    """Count the bytes of bfloat16 state, shape (matrices, levels)."""
    return state_bytes_table(shapes_of(num_layers), LEVELS, "bfloat16")


def damages_of(num_layers: int, seed: int = 0) -> dict[str, Damages]:
    """Make damages of several kinds, each of shape (matrices, levels)."""
    random = np.random.default_rng(seed)
    shapes = shapes_of(num_layers)
    by_role = replace(_UNTUNED, q=4.0, k=4.0, v=0.5, down=2.0)
    equal = damage_table(shapes, _UNTUNED, LEVELS)
    rising = np.sort(random.uniform(size=equal.shape), axis=1)
    saved = (costs_of(num_layers)[:, :1] - costs_of(num_layers)).astype(np.float64)

    def noise(size: float) -> Damages:
        return 1 + size * random.normal(size=(len(shapes), 1))

    return {
        "knobs by role": damage_table(shapes, by_role, LEVELS),
        "knobs by role and depth": damage_table(shapes, replace(by_role, depth_slope=1.0), LEVELS),
        "a weight of its own for each matrix": equal * np.exp(noise(1.0)),
        "drawn for each matrix and level": rising * equal[:, -1:],
        "equal but for a millionth": equal * noise(1e-6),
        "the bytes saved, but for a millionth": saved * noise(1e-6),
        "the bytes saved": saved,
    }


def unlike(num_matrices: int, seed: int = 0) -> tuple[Costs, dict[str, Damages]]:
    """Make matrices of which no two are alike, as no model has them, and near-ties between them."""
    random = np.random.default_rng(seed)
    widths = random.integers(HIDDEN // 2, INTERMEDIATE, num_matrices)
    shapes = {
        f"model.layers.{n}.mlp.up_proj.weight": (int(w), HIDDEN) for n, w in enumerate(widths)
    }
    costs = state_bytes_table(shapes, LEVELS, "bfloat16")
    saved = (costs[:, :1] - costs).astype(np.float64)
    return costs, {
        "no two shapes alike": damage_table(shapes, _UNTUNED, LEVELS),
        "no two shapes alike, the bytes saved": saved,
        "no two shapes alike, the bytes saved, but for a millionth": saved
        * (1 + 1e-6 * random.normal(size=(num_matrices, 1))),
    }


def budget_of(costs: Costs, share: float) -> int:
    """Take a share of what Adam's state costs."""
    return int(costs[:, 0].sum() * share)


def by_milp(
    costs: Costs, damages: Damages, budget: int, *, node_limit: int = 2**31 - 1
) -> tuple[list[int] | None, bool]:
    """Solve by scipy's mixed-integer solver.

    Returns:
        The columns, None if it found none, and whether it proved them best.
    """
    rows, columns = costs.shape
    solved = milp(
        damages.ravel() / damages.max(),
        constraints=[
            LinearConstraint(sparse.kron(sparse.eye(rows), np.ones((1, columns))), 1, 1),
            LinearConstraint(costs.reshape(1, -1) / budget, -np.inf, 1),
        ],
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0, "node_limit": node_limit},
    )
    if solved.x is None:
        return None, False
    return [int(c) for c in solved.x.reshape(rows, columns).argmax(axis=1)], bool(solved.success)


def total(table: NDArray[np.generic], columns: list[int]) -> float:
    return math.fsum(float(row[column]) for row, column in zip(table, columns, strict=True))


def _timed(solve: Callable[[], object]) -> float:
    start = time.process_time()
    solve()
    return time.process_time() - start


def row_of(kind: str, costs: Costs, damages: Damages, share: float, node_limit: int) -> str:
    """Solve one problem both ways and lay the outcome out.

    Raises:
        RuntimeError: Ours does not fit the budget.
    """
    budget = budget_of(costs, share)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        ours = allocate(costs, damages, budget)
    seconds = min(_timed(lambda: _quietly(costs, damages, budget)) for _ in range(REPEATS))
    start = time.process_time()
    theirs, is_proven = by_milp(costs, damages, budget, node_limit=node_limit)
    milps = time.process_time() - start
    if total(costs, ours) > budget:
        raise RuntimeError(f"{kind}: {total(costs, ours)} bytes do not fit {budget}")
    found = total(damages, ours)
    above = "-" if theirs is None else f"{found / total(damages, theirs) - 1:+.1e}"
    over = "-" if theirs is None else f"{total(costs, theirs) / budget - 1:+.1e}"
    exact = "proven" if not caught else str(caught[0].message).split(",")[0].partition("to ")[2]
    proof = "proven" if is_proven else f"stopped after {node_limit} nodes"
    return (
        f"| {kind} | {share:g} | {seconds:.3f} s | {exact} | {milps:.2f} s | {proof} | "
        f"{above} | {over} |"
    )


def _quietly(costs: Costs, damages: Damages, budget: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        allocate(costs, damages, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--node-limit", type=int, default=200, help="of MILP")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    costs = costs_of(LAYERS)
    lines = [
        "# The exact allocation beside scipy's MILP",
        "",
        f"- command: `python -m tests.benchmarks.allocate {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        f"- {packages('numpy', 'scipy')}",
        f"- {costs.shape[0]} matrices of {costs.shape[1]} levels: {LAYERS} layers with the shapes "
        "of LLaMA 70B, bfloat16 state; in the last rows no two shapes are alike",
        "",
        "Time is processor time of one solve, of ours the least of three. MILP runs with a gap of "
        "0. Ours over MILP's: below zero ours is better; MILP may exceed the budget by its own "
        "tolerance, the last column.",
        "",
        "| damage | budget / Adam's | ours | ours is | MILP | MILP is | damage, ours over MILP's | "
        "MILP's cost over the budget |",
        "|---|---|---|---|---|---|---|---|",
    ]
    of_model = [(kind, costs, damages) for kind, damages in damages_of(LAYERS).items()]
    odd, by_kind = unlike(len(costs))
    of_none = [(kind, odd, damages) for kind, damages in by_kind.items()]
    for kind, bytes_of, damages in [*of_model, *of_none]:
        for share in SHARES:
            lines.append(row_of(kind, bytes_of, damages, share, arguments.node_limit))
            print(lines[-1], flush=True)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
