"""Does a signal of one Adam run predict which plan a long run prefers? Two models, 16 plans each.

    python -m tests.benchmarks.signals [--models default] [--kept FOLDER] [--output FILE]

The plans are the folded ones of `ranking`, which share lr and the rule of scales, and so are the
runs: FOLDER holds default.json and larger.json as that benchmark keeps them, and what is missing
there is trained. Split-lr Adam runs once a model, for 300 steps on seed 0; a third and two thirds
through it, every signal is measured for every matrix and level, and averaged. What a plan is
predicted to lose is their mean over its matrices. Kendall's tau then compares the order of plans.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foam_lightning.plan import FoldPlan
from foam_lightning.training import versions
from tests.benchmarks.agreement import (
    NUM_RESAMPLES,
    Estimate,
    Floats,
    Pairs,
    Ratio,
    between,
    bootstrap,
    tau,
)
from tests.benchmarks.damage import LEVELS, SIGNALS, DamageProbe
from tests.benchmarks.heading import dated, machine, publish
from tests.benchmarks.ranking import MODELS, Row, Task, job_of, rows_of, runs_of
from tuner.kept import Kept
from tuner.objective import Bench

PROBE_STEPS = 300
LONG, SHORT = 1200, (150, 300)
SHARE = 0.25  # of Adam's state; plans that keep it are compared among themselves too
BASE = "base curve"
Table = Mapping[str, Sequence[float]]
"""Damage by matrix and level."""


def base_curve(names: Sequence[str]) -> dict[str, list[float]]:
    """Give what random blocks lose of a gradient, whatever the matrix: sqrt(1 - 2**-level)."""
    return {name: [(1 - 0.5**level) ** 0.5 for level in LEVELS] for name in names}


def predicted(plan: FoldPlan, table: Table, weights: Mapping[str, float]) -> float:
    """Average the damage over the matrices of a plan.

    Args:
        plan: Gives the levels.
        table: The damage.
        weights: Weight by matrix.
    """
    total = sum(weights[name] * table[name][level] for name, level in plan.levels.items())
    return total / sum(weights[name] for name in plan.levels)


def lead(one: Floats, rival: Floats, losses: Floats, pairs: Pairs) -> Ratio:
    """Give by how much tau is above that of a rival, over the same pairs."""
    first, second = tau(one, losses, pairs), tau(rival, losses, pairs)
    return Ratio(first.above - second.above, first.below)


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        rows: The plans.
        sizes: Elements by matrix.
        tables: Damage by signal, "base curve" among them.
        losses: By number of steps; shape (seeds, plans).
    """

    rows: Sequence[Row]
    sizes: Mapping[str, float]
    tables: Mapping[str, Table]
    losses: Mapping[int, Floats]


def tables_of(model: str, kept: Kept) -> dict[str, Table]:
    """Measure every signal, in one run of Adam.

    Args:
        model: One of `MODELS`.
        kept: Where they are kept.

    Returns:
        Damage by signal, "base curve" first.
    """
    job = job_of(model)
    plan = rows_of(job)[0].plan
    probes = [DamageProbe(PROBE_STEPS * n // 3) for n in (1, 2)]

    def looked() -> object:
        Bench(job).run(plan, num_steps=PROBE_STEPS, seed=0, callbacks=probes)
        return [probe.found for probe in probes]

    looks = kept.of(json.dumps([model, PROBE_STEPS]), looked)
    return {BASE: base_curve(list(plan.levels))} | {
        signal: {
            name: np.mean([look[signal][name] for look in looks], axis=0).tolist()
            for name in plan.levels
        }
        for signal in SIGNALS
    }


def measure(model: str, runs_at: Path | None, num_seeds: int, kept: Kept) -> Measured:
    """Measure the signals of a model, and give the losses of its plans.

    Args:
        model: One of `MODELS`.
        runs_at: Where `ranking` keeps its runs.
        num_seeds: Seeds from 0.
        kept: Where signals are kept.
    """
    job = job_of(model)
    rows = [row for row in rows_of(job) if row.is_folded]
    tasks = {
        steps: [
            [Task(model, row.plan.to_json(), steps, seed) for row in rows]
            for seed in range(num_seeds)
        ]
        for steps in (LONG, *SHORT)
    }
    runs = runs_of([t for of_steps in tasks.values() for row in of_steps for t in row], runs_at)
    losses = {
        steps: np.array([[runs[task].loss for task in of_seed] for of_seed in of_steps])
        for steps, of_steps in tasks.items()
    }
    sizes = {name: float(math.prod(shape)) for name, shape in job.new_module().foldable.items()}
    return Measured(rows, sizes, tables_of(model, kept), losses)


def table(of: Measured) -> list[str]:
    """Lay out what every signal, the base curve and short runs predict of the long run."""
    alike = [row.share == SHARE for row in of.rows]
    everyone = [True] * len(of.rows)
    lines = [
        f"| prediction | matrices weigh | {len(alike)} plans | above the base curve | "
        f"{sum(alike)} plans of {SHARE:g} of Adam's state | above the base curve |",
        "|---|---|---|---|---|---|",
    ]
    weighings = {"by size": of.sizes, "alike": dict.fromkeys(of.sizes, 1.0)}
    predictions = {
        (signal, words): np.array([predicted(row.plan, damage, weights) for row in of.rows])
        for signal, damage in of.tables.items()
        for words, weights in weighings.items()
    } | {(f"loss after {steps} steps", "-"): of.losses[steps].mean(axis=0) for steps in SHORT}
    rival = predictions[BASE, "by size"]
    for (name, words), values in predictions.items():
        cells = []
        for among in (everyone, alike):
            found, above = compare(values, rival, of.losses[LONG], between(among, among))
            cells += [str(found), "-" if values is rival else str(above)]
        lines.append(f"| {name} | {words} | {' | '.join(cells)} |")
    return lines


def compare(
    values: Floats, rival: Floats, losses: Floats, pairs: Pairs
) -> tuple[Estimate, Estimate]:
    """Give tau of a prediction, and by how much it is above that of a rival.

    Args:
        values: What is predicted, by plan.
        rival: What the rival predicts, likewise.
        losses: What was found, shape (seeds, plans).
        pairs: The pairs of plans that count.
    """
    num_seeds, num_plans = losses.shape

    def of(ratio: Callable[[Floats], Ratio]) -> Estimate:
        return bootstrap(lambda seeds: ratio(losses[seeds].mean(axis=0)), num_plans, num_seeds)

    return (
        of(lambda found: tau(values, found, pairs)),
        of(lambda found: lead(values, rival, found, pairs)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=Path, help="folder of the runs of the ranking benchmark")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    kept = Kept(None if arguments.output is None else arguments.output.with_suffix(".json"))
    lines = [
        "# Signals of one Adam run against the loss of long runs",
        "",
        f"- command: `python -m tests.benchmarks.signals {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- losses after {LONG} steps, mean of seeds 0 to {arguments.seeds - 1}; signals at steps "
        f"{PROBE_STEPS // 3} and {PROBE_STEPS * 2 // 3} of {PROBE_STEPS}, split-lr Adam, seed 0",
        "",
        "Kendall's tau between predicted and found order of plans, with a 95 % interval by "
        f"bootstrap over plans and seeds ({NUM_RESAMPLES} draws). 1: the same order, 0: chance.",
        "",
        *(f"- {name}: {words}" for name, words in SIGNALS.items()),
        f"- {BASE}: sqrt(1 - 2^-level), what random blocks leave out of a gradient; the rival is "
        "the one weighted by size",
    ]
    for model in arguments.models:
        runs_at = None if arguments.kept is None else arguments.kept / f"{model}.json"
        found = measure(model, runs_at, arguments.seeds, kept)
        lines += ["", f"## The {model} model", "", *table(found)]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
