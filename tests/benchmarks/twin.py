"""Does what a search finds on a narrow twin hold at full width, and how do scales carry over?

    python -m tests.benchmarks.twin [--seeds 3] [--short-seeds 1] [--steps 1200] [--output FILE]

The model is the larger one of the ranking, 4 layers of hidden 192, its twin of hidden 64, both on
the data of the default job. First, uniform level 2 and split-lr Adam at both widths and several
scales, in complete runs of 300 steps. Then a budget that level 2 fits and Adam does not: a search
of 12 short runs of 300 steps on the twin, whose plan is widened and trained at full width, beside
the plan that a search is not needed for, uniform ones of its bytes, and four Adams. One thread
trains. Runs are kept beside FILE, in FILE.kept: interrupted, it goes on from them. Delete them
after a change of the code.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from foam_lightning.job import Job
from foam_lightning.training import versions
from foam_lightning.units import in_words
from tests.benchmarks.heading import dated, machine, publish
from tests.benchmarks.kept_runs import Row, Runs, say
from tests.benchmarks.ranking import job_of
from tuner.effort import Effort
from tuner.fitting import Fitting
from tuner.objective import ShortRun, paired_difference
from tuner.outcome import Outcome
from tuner.scales import ADAMS_QK, scales_in_words, turned
from tuner.search import search
from tuner.twin import Twin, twin_sizes

FACTORS = (6.0, 3.0, 1.5, 1.0, 0.5)  # three is the ratio of the widths
SHORT = 300
LEVEL = 2  # the lowest that fits the budget
EFFORT = Effort(num_trials=12, steps=SHORT, num_seeds=2)


def twin_of(job: Job) -> Twin:
    """Make the twin for a budget that the model fits at level 2 and above."""
    roomy = Fitting(job, sys.maxsize)
    budget = roomy.accountant.account(roomy.uniform(LEVEL)).peak_bytes
    return Twin(job, roomy.with_budget(budget))


def width_table(jobs: Sequence[Job], kept: Path, num_seeds: int) -> list[str]:
    """Lay out losses by scale, the same scales at every width.

    Args:
        jobs: One for each width, with the settings of the full model.
        kept: A folder for the runs.
        num_seeds: Seeds from 0.
    """
    lines = [
        "| width | plan | " + " | ".join(f"x {factor:.3g}" for factor in FACTORS) + " |",
        "|---|---|" + "---|" * len(FACTORS),
    ]
    for job in jobs:
        width = job.model["hidden_size"]
        runs = Runs(job, SHORT, kept / f"width_{width}.json")
        for level, name in ((LEVEL, f"uniform level {LEVEL}"), (0, "split-lr Adam")):
            plan = job.plan_at(level)
            cells = []
            for factor in FACTORS:
                row = Row(
                    f"width {width}, {name}",
                    f"scale x {factor:.3g}",
                    turned(plan, scale_factor=factor),
                )
                losses = [runs.of(row, seed).loss for seed in range(num_seeds)]
                cells.append(" / ".join(f"{loss:.4f}" for loss in losses))
            scale = scales_in_words(plan)
            lines.append(f"| {width} | {name}, scale {scale} | {' | '.join(cells)} |")
    return lines


def searched(twin: Twin, folder: Path) -> Outcome:
    """Search on the twin, or take up the search where it was left."""
    folder.mkdir(exist_ok=True)
    found = search(
        twin.job,
        twin.fitting,
        folder,
        EFFORT,
        on_run=lambda what, loss: say(f"twin: {what}: {loss:.4f}"),
    )
    return twin.outcome(found)


def rows_of(fitting: Fitting, outcome: Outcome) -> list[Row]:
    """List what is trained at full width; the first is the plan that was found."""
    winner, adam = outcome.winner, fitting.uniform(0)
    level = min(
        fitting.uniform_levels,
        key=lambda n: abs(fitting.folded_bytes(fitting.uniform(n)) - winner.state_bytes),
    )
    uniform = fitting.uniform(level)
    of_twin = next((c.plan for c in outcome.finalists if c.label == f"uniform level {level}"), None)
    return [
        Row(winner.label, "found on the twin", winner.plan),
        *(
            [Row(f"uniform level {level}", "found on the twin", of_twin)]
            if of_twin not in (None, winner.plan)
            else []
        ),
        Row("without a search", "as configured", fitting.untuned()),
        Row(f"uniform level {level}", "as configured", uniform),
        Row("split-lr Adam", "as configured", adam),
        *(
            Row("split-lr Adam", f"q, k x {ADAMS_QK:g}, lr x {factor:g}", plan)
            for factor in (0.5, 1.0, 2.0)
            for plan in (turned(adam, qk_factor=ADAMS_QK, lr_factor=factor),)
        ),
    ]


def transfer_table(
    fitting: Fitting, rows: Sequence[Row], runs: Sequence[Sequence[ShortRun]]
) -> list[str]:
    """Lay out what was trained at full width, every row with its runs by seed."""
    seeds = range(len(runs[0]))
    lines = [
        "| plan | | lr | scales | state of the matrices | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean | to the plan found |",
        "|---|---|---|---|---|" + "---|" * (len(seeds) + 2),
    ]
    for row, of_row in zip(rows, runs, strict=True):
        losses = [run.loss for run in of_row]
        gap = "-" if row is rows[0] else str(paired_difference(of_row, runs[0]))
        lines.append(
            f"| {row.name} | {row.rule} | {row.plan.lr:g} | {scales_in_words(row.plan)} | "
            f"{in_words(fitting.folded_bytes(row.plan))} | "
            + " | ".join(f"{loss:.4f}" for loss in losses)
            + f" | {sum(losses) / len(losses):.4f} | {gap} |"
        )
    return lines


def search_table(outcome: Outcome) -> list[str]:
    """Lay out the finals on the twin."""
    lines = ["| finalist on the twin | loss | to the plan found |", "|---|---|---|"]
    for candidate in sorted(outcome.finalists, key=lambda c: c.loss):
        gap = "-" if candidate is outcome.winner else str(candidate.against(outcome.winner))
        lines.append(f"| {candidate.label} | {candidate.loss:.4f} | {gap} |")
    return lines


def by_width(job: Job, kept: Path, num_seeds: int) -> list[str]:
    """Run both widths at several scales, and lay them out.

    Args:
        job: At full width.
        kept: A folder for what was run.
        num_seeds: From 0.
    """
    sizes = twin_sizes(job.plan_at(LEVEL).model)
    as_wide = replace(job, model={**job.model, **sizes})  # which keeps the scales
    return [
        "## How scales carry over",
        "",
        f"Validation loss after {SHORT} steps at lr {job.model['lr']:g}, by factor on the scale of "
        f"every matrix, on {num_seeds} seed{'s' * (num_seeds > 1)}.",
        "",
        *width_table([as_wide, job], kept, num_seeds),
    ]


def transferred(job: Job, kept: Path, *, num_seeds: int, num_steps: int) -> list[str]:
    """Search on the twin, train at full width, and lay both out.

    Args:
        job: At full width.
        kept: A folder for what was run.
        num_seeds: Of the runs at full width, from 0.
        num_steps: Their optimizer steps.
    """
    twin = twin_of(job)
    fitting = twin.full
    outcome = searched(twin, kept / "search")
    rows = rows_of(fitting, outcome)
    runs = Runs(job, num_steps, kept / "full.json")
    by_seed = [[runs.of(row, seed) for row in rows] for seed in range(num_seeds)]
    return [
        "",
        "## A plan found on the twin, at full width",
        "",
        f"Adam does not fit {in_words(fitting.budget_bytes)}: tuning on {twin}. "
        f"{outcome.reason[0].upper()}{outcome.reason[1:]}.",
        "",
        *search_table(outcome),
        "",
        f"At full width, {num_steps} steps, short runs on the twin at the learning rate of their "
        "length. A difference is paired, same weights and batches; its "
        "interval holds evaluation batches and a seed deviation of 0.01. Above zero the plan found "
        "is better.",
        "",
        *transfer_table(fitting, rows, list(zip(*by_seed, strict=True))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="at full width; 0 leaves it out")
    parser.add_argument("--short-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        kept = Path(temporary)
        if arguments.output is not None:
            kept = arguments.output.with_suffix(".kept")
            kept.mkdir(exist_ok=True)
        job = job_of("larger")
        job = replace(job, trainer={**job.trainer, "max_steps": arguments.steps})
        found = by_width(job, kept, arguments.short_seeds)
        if seeds := arguments.seeds:
            found += transferred(job, kept, num_seeds=seeds, num_steps=arguments.steps)
    lines = [
        "# A narrow twin, and what is found on it at full width",
        "",
        f"- command: `python -m tests.benchmarks.twin {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        "",
        *found,
    ]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
