"""Do levels train better at one scale for Adam and one for folded, or with updates of one RMS?

    python -m tests.benchmarks.scales [--seeds 2] [--mixed 3] [--steps 300] [--output FILE]

Every plan of the default job runs with the scales of each rule, from the same weights on the same
batches. "per level" is .1 at level 0 and .25 above; "equal RMS" divides a target by the RMS of the
update at the level, measured in the run of split-lr Adam; "equal RMS by role" does so for each role
apart. The target is that of uniform level 2. Runs are kept beside FILE, as .json: interrupted, it
goes on from them. Delete them after a change of the code.
"""

import argparse
import logging
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from foam_lightning.job import Job
from foam_lightning.roles import ROLES, layer_of, role_of
from foam_lightning.training import versions
from foam_lightning.units import in_words
from tests.benchmarks.heading import ROOT, dated, machine
from tests.benchmarks.kept_runs import RmsByRole, Row, Runs
from tuner.fitting import Fitting
from tuner.objective import ShortRun, paired_difference
from tuner.scales import scales_in_words, turned
from tuner.settings import parse

BASE = 2  # the uniform level whose scale sets the target
ADAM = "split-lr Adam"
# What the search of the default job found for Adam (docs/log.md): twice the rate, half the scale.
FASTER_ADAM = "split-lr Adam, lr x 2, scale / 2"

PER_LEVEL, EQUAL, BY_ROLE = "per level", "equal RMS", "equal RMS by role"
HALF = ", half the target"
QK_LOW, ALTERNATELY = "q, k at level 0, rest 3", "alternately level 0 and 3"
MIXED: dict[str, Callable[[str], int]] = {
    QK_LOW: lambda name: 0 if role_of(name) in ("q", "k") else 3,
    "first layer at level 1, rest 3": lambda name: 1 if layer_of(name) == 0 else 3,
    ALTERNATELY: lambda name: (
        3 * ((len(ROLES) * (layer_of(name) or 0) + ROLES.index(role_of(name))) % 2)
    ),
}


def rms_by_level(by_role: RmsByRole, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, float]:
    """Average the RMS of the update over roles: that of all elements of all matrices.

    Args:
        by_role: RMS by role and level; the roles share their levels.
        shapes: The matrices that fold, by qualified name.
    """
    counts = Counter[str]()
    for name, shape in shapes.items():
        counts[role_of(name)] += math.prod(shape)
    return {
        level: math.sqrt(
            sum(count * by_role[role][level] ** 2 for role, count in counts.items())
            / counts.total()
        )
        for level in next(iter(by_role.values()))
    }


def adam_rows(job: Job) -> list[Row]:
    adam = job.plan_at(0)
    faster = turned(adam, lr_factor=2.0, scale_factor=0.5)
    return [Row(ADAM, PER_LEVEL, adam), Row(FASTER_ADAM, PER_LEVEL, faster)]


def rows_of(job: Job, by_role: RmsByRole, num_mixed: int) -> list[Row]:
    """List all rows but those of Adam; the first is uniform level 2."""
    adam, base = job.plan_at(0), job.plan_at(BASE)
    unfolded, folded = (plan.scales[next(iter(plan.scales))] for plan in (adam, base))
    shapes = job.new_module().foldable
    rms = rms_by_level(by_role, shapes)
    target = folded * rms[BASE]

    def scale_by(rule: str, name: str, level: int) -> float:
        if rule == PER_LEVEL:
            return folded if level else unfolded
        return target / (by_role[role_of(name)] if rule == BY_ROLE else rms)[level]

    def rowed(name: str, levels: Mapping[str, int], rule: str, factor: float = 1.0) -> Row:
        scales = {n: factor * scale_by(rule, n, level) for n, level in levels.items()}
        words = rule if factor == 1 else rule + HALF
        return Row(name, words, replace(base, levels=levels, scales=scales))

    def uniform(level: int, rule: str) -> Row:
        return rowed(f"uniform level {level}", dict.fromkeys(shapes, level), rule)

    rows = [uniform(BASE, PER_LEVEL), uniform(BASE, BY_ROLE), uniform(0, EQUAL)]
    rows += [uniform(level, rule) for level in (1, 3, 4) for rule in (PER_LEVEL, EQUAL)]
    for name, level_of in list(MIXED.items())[:num_mixed]:
        levels = {n: level_of(n) for n in shapes}
        rows += [rowed(name, levels, rule) for rule in (PER_LEVEL, EQUAL, BY_ROLE)]
        if 0 in levels.values():
            rows += [rowed(name, levels, rule, 0.5) for rule in (PER_LEVEL, EQUAL)]

    def by_hand(name: str, levels: Mapping[str, int], qk_scale: float) -> Row:
        scales = {n: qk_scale if is_qk[n] else scale_by(PER_LEVEL, n, levels[n]) for n in levels}
        return Row(name, "by hand", replace(base, levels=levels, scales=scales))

    # Is what q and k gain at level 0 due to the state, or to the lower scale that comes with it?
    is_qk = {n: role_of(n) in ("q", "k") for n in shapes}
    higher = {n: BASE + 1 if is_qk[n] else BASE for n in shapes}
    lower, alternate = ({n: MIXED[name](n) for n in shapes} for name in (QK_LOW, ALTERNATELY))
    third = dict.fromkeys(shapes, 3)
    return [
        *rows,
        by_hand(f"q, k at level {BASE + 1} and scale {unfolded:g}, rest {BASE}", higher, unfolded),
        by_hand(f"uniform level 3, q, k at scale {unfolded:g}", third, unfolded),
        by_hand(f"{QK_LOW}, q, k at scale {folded:g}", lower, folded),
        by_hand(f"{ALTERNATELY}, q, k at scale {folded:g}", alternate, folded),
        by_hand(f"{ADAM}, q, k at scale {folded:g}", dict.fromkeys(shapes, 0), folded),
    ]


def table(job: Job, rows: Sequence[Row], runs: Sequence[Sequence[ShortRun]]) -> list[str]:
    """Lay the rows out, each with its runs by seed."""
    fitting = Fitting(job, sys.maxsize)
    num_seeds = len(runs[0])
    base = next(i for i, row in enumerate(rows) if row.name == f"uniform level {BASE}")
    lines = [
        "| plan | rule | scales | state of the matrices | "
        + " | ".join(f"seed {seed}" for seed in range(num_seeds))
        + f" | mean | to the same levels, per level | to uniform level {BASE} |",
        "|---|---|---|---|" + "---|" * (num_seeds + 3),
    ]
    for i, row in enumerate(rows):
        same = next(
            (
                j
                for j, other in enumerate(rows)
                if other.plan.levels == row.plan.levels and other.rule == PER_LEVEL
            ),
            i,
        )
        state = fitting.folded_bytes(row.plan)
        losses = [run.loss for run in runs[i]]
        lines.append(
            f"| {row.name} | {row.rule} | {scales_in_words(row.plan)} | {in_words(state)} | "
            + " | ".join(f"{loss:.4f}" for loss in losses)
            + f" | {sum(losses) / len(losses):.4f} | {_against(runs, i, same)} | "
            + f"{_against(runs, i, base)} |"
        )
    return lines


def _against(runs: Sequence[Sequence[ShortRun]], one: int, other: int) -> str:
    if one == other:
        return "-"
    difference = paired_difference(runs[one], runs[other])
    return "diverged" if math.isnan(difference.mean) else str(difference)


def rms_table(probed: Mapping[int, RmsByRole], at_step: int, job: Job) -> list[str]:
    shapes = job.new_module().foldable
    levels = range(5)
    lines = [
        "| update of | " + " | ".join(f"level {level}" for level in levels) + " |",
        "|---|" + "---|" * len(levels),
    ]
    for role, by_level in probed[at_step].items():
        cells = " | ".join(f"{by_level[level]:.3f}" for level in levels)
        lines.append(f"| {role}, step {at_step} | {cells} |")
    for step, by_role in probed.items():
        rms = rms_by_level(by_role, shapes)
        cells = " | ".join(f"{rms[level]:.3f}" for level in levels)
        lines.append(f"| all, step {step} | {cells} |")
    return lines


def measure(job: Job, *, num_seeds: int, num_mixed: int, num_steps: int, kept: Path | None) -> str:
    """Run everything and write the two tables.

    Args:
        job: What to train.
        num_seeds: Seeds from 0.
        num_mixed: How many of the mixed plans.
        num_steps: Optimizer steps of each run.
        kept: Where to keep finished runs.
    """
    runs = Runs(job, num_steps, kept)
    adams = adam_rows(job)
    at_step = num_steps * 2 // 3  # as the tuner does
    probed = runs.probed(adams[0], [num_steps // 6, num_steps // 3, at_step, num_steps - 1])
    rows = [*adams, *rows_of(job, probed[at_step], num_mixed)]
    by_seed = [[runs.of(row, seed) for row in rows] for seed in range(num_seeds)]
    return "\n".join(
        [
            "Validation loss in nats per token. A difference is paired, same weights and batches; "
            "its interval holds evaluation batches and a seed deviation of 0.01. Below zero the "
            "row is better.",
            "",
            *table(job, rows, list(zip(*by_seed, strict=True))),
            "",
            f"RMS of the update before learning rate and scale, in the run of {ADAM} on seed 0; "
            f"the scales above follow from step {at_step}.",
            "",
            *rms_table(probed, at_step, job),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mixed", type=int, default=len(MIXED), help="how many mixed plans")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    job = parse("fit", [], default=ROOT / "configs" / "default.yaml").job()
    output = arguments.output
    found = measure(
        job,
        num_seeds=arguments.seeds,
        num_mixed=arguments.mixed,
        num_steps=arguments.steps,
        kept=None if output is None else output.with_suffix(".json"),
    )
    lines = [
        "# Scales: one for Adam and one for folded, or updates of one RMS",
        "",
        f"- command: `python -m tests.benchmarks.scales {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- the default job, complete schedules of {arguments.steps} steps, seeds 0 to "
        f"{arguments.seeds - 1}",
        "",
        found,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
