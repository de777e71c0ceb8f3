"""Is the tuned plan as good as Adam, and better than uniform and random ones of its bytes?

    python -m tests.benchmarks.tuned [--model default] [--seeds 3] [--steps 1200] [--output FILE]

The search runs at a half, a quarter and an eighth of Adam's state of the matrices, on seed 0, with
Adam to compare with, which may not win there. What wins, and the best mixed plan, then train in
full on every seed beside every Adam (of the ranking, and as found), uniform levels and random plans
of the same bytes. The Adam of lowest mean is the reference: it is chosen on the very runs that are
compared, which no other plan is. Two processes of one thread each train. Studies and runs are kept
beside FILE: interrupted, it goes on from them. Delete them after a change of the code.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from typing_extensions import override

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.training import versions
from foam_lightning.units import format_bytes
from tests.benchmarks.heading import commit_and_date, machine, publish
from tests.benchmarks.rival_plans import MODELS, Task, job_of, plans_of, runs_of
from tuner.planning.planner import BudgetPlanner
from tuner.planning.scales import ADAM_QK_FACTOR, describe_scales, scale_plan
from tuner.search.search import search
from tuner.trials.budget import SearchBudget
from tuner.trials.cache import job_key, load_earlier_trials
from tuner.trials.results import SearchResult
from tuner.trials.runner import TrialResult, paired_difference

LOWEST_LEVELS = (1, 2, 3)  # a half, a quarter and an eighth of Adam's state
# Of the learning rate of the configuration, beside those of the ranking.
ADAM_RATES = {"default": (0.25, 0.5), "larger": (0.5, 2.0)}
EFFORT = SearchBudget(num_trials=12, steps=300, num_seeds=2)


class StateBudgetPlanner(BudgetPlanner):
    """The plans that take no more state than a uniform level does, and Adam to compare with.

    Args:
        job: What to train.
        lowest: The level.
    """

    def __init__(self, job: Job, lowest: int) -> None:
        super().__init__(job, None)
        self._lowest = lowest

    @cached_property
    @override
    def memory_options(self) -> MemoryOptions:
        return self.job.memory_options

    @cached_property
    @override
    def uniform_levels(self) -> list[int]:
        return [0, *range(self._lowest, 9)]

    @property
    @override
    def adam_may_win(self) -> bool:
        return False

    @cached_property
    @override
    def max_state_bytes(self) -> int:
        return self.folded_state_bytes(self.uniform(self._lowest))


@dataclass(frozen=True)
class Row:
    """A plan of the table.

    Attributes:
        name: What it is.
        share: Its part of Adam's state, 1, 1/2, 1/4 or 1/8.
        plan: The plan, with the learning rate of the full length.
    """

    name: str
    share: float
    plan: FoldPlan


def run_search(job: Job, lowest: int, folder: Path) -> SearchResult:
    """Search within the bytes of a uniform level; what earlier searches ran is not run again."""
    place = folder / f"level_{lowest}"
    place.mkdir(parents=True, exist_ok=True)
    others = [path for path in sorted(folder.glob("level_*/study.db")) if path.parent != place]
    return search(
        job,
        StateBudgetPlanner(job, lowest),
        place,
        EFFORT,
        known=load_earlier_trials(others, job_key(job)),
        on_run=lambda *run: print(lowest, *run, flush=True),
    )


def rows(job: Job, model: str, folder: Path) -> tuple[list[Row], list[str]]:
    """List the plans, and why each search chose its winner."""
    found = [
        Row(row.name, row.share, row.plan)
        for row in plans_of(model)
        if row.share in (1, 0.5, 0.25, 0.125) and (not row.is_folded or "low" not in row.name)
    ]
    adam = job.uniform_plan(0)
    for factor in ADAM_RATES[model]:
        plan = scale_plan(adam, lr_factor=factor, qk_factor=ADAM_QK_FACTOR)
        found.append(Row(f"split-lr Adam, q, k at .25, lr x {factor:g}", 1, plan))
    reasons = []
    for lowest in LOWEST_LEVELS:
        search_result = run_search(job, lowest, folder)
        share = 0.5**lowest
        reasons.append(f"- at {share:g} of Adam's state, the search chose: {search_result.reason}")
        for c in search_result.finalists:
            where = 2.0 ** round(math.log2(c.state_bytes / search_result.adam_state_bytes))
            is_winner = c is search_result.winner
            if c.kind == "uniform" and not is_winner:
                continue
            name = f"**{c.label}, chosen at {share:g}**" if is_winner else f"{c.label}, found"
            if is_winner or all(row.plan != c.plan for row in found):
                found.append(Row(name, where, c.plan))
    return sorted(found, key=lambda row: -row.share), reasons


def mean_loss(runs: Sequence[TrialResult]) -> float:
    return sum(run.loss for run in runs) / len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kept", type=Path, help="a folder; runs.json in it, and the studies")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output: Path | None = arguments.output
    kept: Path = (
        arguments.kept
        or (output and output.with_suffix(""))
        or Path(tempfile.mkdtemp(prefix="tuned-"))
    )
    kept.mkdir(parents=True, exist_ok=True)
    job = job_of(arguments.model)
    job = replace(job, trainer=job.trainer.replace(max_steps=arguments.steps))
    table, reasons = rows(job, arguments.model, kept)
    seeds = range(arguments.seeds)

    def task(row: Row, seed: int) -> Task:
        return Task(arguments.model, row.plan.to_json(), arguments.steps, seed)

    runs = runs_of([task(row, seed) for seed in seeds for row in table], kept / "runs.json")
    of_row = [[runs[task(row, seed)] for seed in seeds] for row in table]
    of_adam = [found for found, row in zip(of_row, table, strict=True) if row.share == 1]
    reference = min(of_adam, key=mean_loss)
    planner = BudgetPlanner(job, None)
    lines = [
        f"# Tuned plans against Adam, uniform and random ones, the {arguments.model} model",
        "",
        f"- command: `python -m tests.benchmarks.tuned {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {commit_and_date()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- searches on seed 0: {EFFORT.num_trials} short runs of {EFFORT.steps} steps, a race of "
        f"{EFFORT.final_steps} steps over {EFFORT.num_seeds} seeds; full runs of "
        f"{arguments.steps} steps on seeds 0 to {arguments.seeds - 1}",
        *reasons,
        "",
        "Validation loss in nats per token. Differences are paired, same weights and batches, with "
        "95 % intervals; below zero the row is better: than the Adam of lowest mean, and than the "
        "uniform level of the same bytes at the learning rate and scale of the configuration.",
        "",
        "| state | plan | lr | scale | bytes | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean | to Adam | to uniform |",
        "|---|---|---|---|---|" + "---|" * (arguments.seeds + 3),
    ]
    uniform = {
        row.share: found
        for row, found in zip(table, of_row, strict=True)
        if row.name.startswith("uniform level") and "," not in row.name
    }
    for row, found in zip(table, of_row, strict=True):
        beside = uniform.get(row.share)
        lines.append(
            f"| {row.share:g} | {row.name} | {row.plan.lr:g} | {describe_scales(row.plan)} | "
            f"{format_bytes(planner.folded_state_bytes(row.plan))} | "
            + " | ".join(f"{run.loss:.4f}" for run in found)
            + f" | {mean_loss(found):.4f} | {_against(found, reference)} | "
            + f"{'' if beside is None else _against(found, beside)} |"
        )
    publish(lines, output)


def _against(runs: Sequence[TrialResult], others: Sequence[TrialResult]) -> str:
    return "0" if runs is others else str(paired_difference(runs, others))


if __name__ == "__main__":
    main()
