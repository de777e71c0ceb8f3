"""Does what the tuner chose hold on the full run? Three seeds, everything paired.

    python -m tests.benchmarks.default_job [--memory-budget 24GB] [--seeds 3] [--output FILE]

Tunes the default job once, on seed 0 as `fit` does, then trains every finalist (split-lr Adam, the
best uniform level, the uniform level at half the bytes, the best mixed plan at equal bytes) for
the full length on every seed, and Adam at other learning rates and scales too: the one that does
best there is the reference, chosen on the very runs that are compared, which no other plan is.
Two processes of one thread each train. Interrupted, it starts again.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.training import versions
from foam_lightning.units import ByteSize, in_words
from tests.benchmarks.heading import ROOT, dated, machine, publish
from tuner.fitting import Fitting
from tuner.objective import Bench, ShortRun, paired_difference
from tuner.scales import scales_in_words, turned
from tuner.search import search
from tuner.settings import parse

# Factors on learning rate, scale, and scale of q and k, beside those that the search finds.
ADAM = ((1.0, 1.0, 1.0), (1.0, 1.0, 2.5), (2.0, 0.5, 1.0), (2.0, 1.0, 1.0))


def default_job() -> Job:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return parse("fit", [], default=ROOT / "configs" / "default.yaml").job()


def full_run(task: tuple[str, int]) -> ShortRun:
    """Train by a plan, given as JSON, on a seed."""
    torch.set_num_threads(1)
    text, seed = task
    job = default_job()
    return Bench(job).run(FoldPlan.from_json(text), num_steps=job.max_steps, seed=seed)


def full_runs(plans: Sequence[FoldPlan], num_seeds: int) -> list[list[ShortRun]]:
    """Train by every plan on every seed, and give the runs of each plan."""
    tasks = [(plan.to_json(), seed) for plan in plans for seed in range(num_seeds)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        found = list(processes.map(full_run, tasks))
    return [found[at : at + num_seeds] for at in range(0, len(found), num_seeds)]


def mean_loss(runs: Sequence[ShortRun]) -> float:
    return sum(run.loss for run in runs) / len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-budget", default="24GB")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = parse("fit", [], default=ROOT / "configs" / "default.yaml")
    torch.set_num_threads(1)
    job = default_job()
    fitting = Fitting(job, ByteSize(arguments.memory_budget))
    with tempfile.TemporaryDirectory() as folder:
        outcome = search(
            job, fitting, Path(folder), settings.tune, on_run=lambda *run: print(*run, flush=True)
        )
    factors = ("lr_factor", "scale_factor", "qk_factor")
    adam = fitting.uniform(0)
    grid = [turned(adam, **dict(zip(factors, point, strict=True))) for point in ADAM]
    rows = [
        *(("split-lr Adam", plan) for plan in grid),
        *((finalist.label, finalist.plan) for finalist in outcome.finalists),
    ]
    runs = full_runs([plan for _, plan in rows], arguments.seeds)
    of_adam = [found for found, (label, _) in zip(runs, rows, strict=True) if "Adam" in label]
    reference = min(of_adam, key=mean_loss)
    lines = [
        "# The default job: short run against full run",
        "",
        f"- command: `python -m tests.benchmarks.default_job {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- budget {arguments.memory_budget}, search on seed 0: {settings.tune.trials} short runs "
        f"of {settings.tune.steps} steps, finals on seed 1; full runs of {job.max_steps} steps on "
        f"seeds 0 to {arguments.seeds - 1}",
        f"- the search chose: {outcome.reason}",
        "",
        "Validation loss in nats per token. The difference is paired with the Adam of lowest "
        "mean, same weights and batches; its interval holds evaluation batches and a seed "
        "deviation of 0.01. The last Adam is the one that the search found.",
        "",
        "| plan | lr | scale | state of the matrices | "
        + " | ".join(f"seed {seed}" for seed in range(arguments.seeds))
        + " | mean | difference | |",
        "|---|---|---|---|" + "---|" * (arguments.seeds + 3),
    ]
    for (label, plan), of_plan in zip(rows, runs, strict=True):
        difference = "0" if of_plan is reference else str(paired_difference(of_plan, reference))
        lines.append(
            f"| {label} | {plan.lr:g} | {scales_in_words(plan)} | "
            f"{in_words(fitting.folded_bytes(plan))} | "
            + " | ".join(f"{run.loss:.4f}" for run in of_plan)
            + f" | {mean_loss(of_plan):.4f} | {difference} | "
            + ("chosen |" if plan == outcome.winner.plan else "|")
        )
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
