"""Compare tuned plans with Adam and with uniform and random plans of the same bytes.

    python -m tests.benchmarks.tuned [--model default] [--seeds 3] [--steps 1200] [--output FILE]

The search runs with a half, a quarter and an eighth of Adam's state of the matrices, on seed 0,
with Adam as the reference, which may not win. The winner and the best mixed plan of each search
then train in full on every seed, as do several settings of Adam, uniform levels and random plans.
The reference of the table is the Adam of lowest mean loss, chosen on the very runs that are
compared, which favours Adam. Two processes of one thread train at a time. Studies and results are
saved next to FILE, and an interrupted run resumes from them: delete them after changing the code.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from typing_extensions import override

from foam_lightning.job import Job
from foam_lightning.plan import MemoryOptions
from foam_lightning.training import versions
from foam_lightning.units import format_bytes
from tests.benchmarks.heading import commit_and_date, machine, publish
from tests.benchmarks.rival_plans import MODELS, RivalPlan, Task, make_job, rival_plans, run_tasks
from tuner.planning.planner import BudgetPlanner
from tuner.planning.scales import ADAM_QK_FACTOR, describe_scales, scale_plan
from tuner.search.search import search
from tuner.trials.budget import SearchBudget
from tuner.trials.cache import CachedRunner, job_key, load_earlier_trials
from tuner.trials.results import SearchResult
from tuner.trials.runner import TrialResult, TrialRunner, paired_difference

LOWEST_LEVELS = (1, 2, 3)  # a half, a quarter and an eighth of Adam's state
# Further settings of Adam: factors of the configured learning rate.
ADAM_RATES = {"default": (0.25, 0.5), "larger": (0.5, 2.0)}
BUDGET = SearchBudget(num_trials=12, steps=300, num_seeds=2)


class StateBudgetPlanner(BudgetPlanner):
    """Plans with no more state than a uniform level has, and Adam as the reference.

    Args:
        job: What to train.
        lowest: The uniform level.
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


def run_search(job: Job, lowest: int, folder: Path) -> SearchResult:
    """Search within the bytes of a uniform level, reusing the trials of the other searches."""
    own = folder / f"level_{lowest}"
    own.mkdir(parents=True, exist_ok=True)
    others = [path for path in sorted(folder.glob("level_*/study.db")) if path.parent != own]
    runner = CachedRunner(
        TrialRunner(job),
        load_earlier_trials(others, job_key(job)),
        on_run=lambda *run: print(lowest, *run, flush=True),
    )
    return search(StateBudgetPlanner(job, lowest), runner, own, BUDGET)


def collect_plans(job: Job, model: str, folder: Path) -> tuple[list[RivalPlan], list[str]]:
    """Run the searches; return all plans to compare, and a line for each search."""
    found = [
        rival
        for rival in rival_plans(model)
        if rival.share in (1, 0.5, 0.25, 0.125) and (not rival.is_folded or "low" not in rival.name)
    ]
    adam = job.uniform_plan(0)
    for factor in ADAM_RATES[model]:
        plan = scale_plan(adam, lr_factor=factor, qk_factor=ADAM_QK_FACTOR)
        found.append(RivalPlan(f"split-lr Adam, q, k at .25, lr x {factor:g}", 1, plan))
    reasons = []
    for lowest in LOWEST_LEVELS:
        result = run_search(job, lowest, folder)
        share = 0.5**lowest
        reasons.append(f"- search at {share:g} of Adam's state: {result.reason}")
        for c in result.finalists:
            is_winner = c is result.winner
            if c.kind == "uniform" and not is_winner:
                continue
            share_of_adam = 2.0 ** round(math.log2(c.state_bytes / result.adam_state_bytes))
            name = f"**{c.label}, chosen at {share:g}**" if is_winner else f"{c.label}, found"
            if is_winner or all(rival.plan != c.plan for rival in found):
                found.append(RivalPlan(name, share_of_adam, c.plan))
    return sorted(found, key=lambda rival: -rival.share), reasons


def mean_loss(runs: Sequence[TrialResult]) -> float:
    return sum(run.loss for run in runs) / len(runs)


def compare_runs(runs: Sequence[TrialResult], others: Sequence[TrialResult]) -> str:
    return "0" if runs is others else str(paired_difference(runs, others))


def table(
    job: Job, rivals: Sequence[RivalPlan], results: Sequence[Sequence[TrialResult]]
) -> list[str]:
    """Lay out the results of the plans, one result per seed."""
    planner = BudgetPlanner(job, None)
    num_seeds = len(results[0])
    pairs = list(zip(rivals, results, strict=True))
    adam = min((runs for rival, runs in pairs if rival.share == 1), key=mean_loss)
    uniform = {
        rival.share: runs
        for rival, runs in pairs
        if rival.name.startswith("uniform level") and "," not in rival.name
    }
    lines = [
        "| state | plan | lr | scale | bytes | "
        + " | ".join(f"seed {seed}" for seed in range(num_seeds))
        + " | mean | to Adam | to uniform |",
        "|---|---|---|---|---|" + "---|" * (num_seeds + 3),
    ]
    for rival, runs in pairs:
        of_bytes = uniform.get(rival.share)
        lines.append(
            f"| {rival.share:g} | {rival.name} | {rival.plan.lr:g} | "
            f"{describe_scales(rival.plan)} | "
            f"{format_bytes(planner.folded_state_bytes(rival.plan))} | "
            + " | ".join(f"{run.loss:.4f}" for run in runs)
            + f" | {mean_loss(runs):.4f} | {compare_runs(runs, adam)} | "
            + f"{'' if of_bytes is None else compare_runs(runs, of_bytes)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help="where runs.json and the studies are saved")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output: Path | None = arguments.output
    folder: Path = (
        arguments.folder
        or (output and output.with_suffix(""))
        or Path(tempfile.mkdtemp(prefix="tuned-"))
    )
    folder.mkdir(parents=True, exist_ok=True)
    job = make_job(arguments.model)
    job = replace(job, trainer=job.trainer.replace(max_steps=arguments.steps))
    rivals, reasons = collect_plans(job, arguments.model, folder)
    tasks = [
        [Task(arguments.model, rival.plan.to_json(), arguments.steps, seed) for rival in rivals]
        for seed in range(arguments.seeds)
    ]
    found = run_tasks([task for of_seed in tasks for task in of_seed], folder / "runs.json")
    results = [[found[task] for task in of_rival] for of_rival in zip(*tasks, strict=True)]
    lines = [
        f"# Tuned plans against Adam, uniform and random ones, the {arguments.model} model",
        "",
        f"- command: `python -m tests.benchmarks.tuned {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {commit_and_date()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- searches on seed 0: {BUDGET.num_trials} short runs of {BUDGET.steps} steps, finals of "
        f"{BUDGET.final_steps} steps on {BUDGET.num_seeds} seeds; full runs of "
        f"{arguments.steps} steps on seeds 0 to {arguments.seeds - 1}",
        *reasons,
        "",
        "Validation loss in nats per token. Differences are paired (same weights and batches), "
        "with 95 % intervals: to the Adam of lowest mean, and to the uniform level of the same "
        "bytes with the configured learning rate and scale. Below zero the row is better.",
        "",
        *table(job, rivals, results),
    ]
    publish(lines, output)


if __name__ == "__main__":
    main()
