"""Does what the tuner chose hold on the full run? Three seeds, everything paired.

    python -m tests.benchmarks.default_job [--memory-budget 24GB] [--seeds 3] [--output FILE]

Tunes the default job once, on seed 0 as `fit` does, then trains every finalist (split-lr Adam, the
best uniform level, the uniform level at half the bytes, the best mixed plan at equal bytes) for
the full length on every seed, and prints one table. Interrupted, it starts again.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

from foam_lightning.training import versions
from foam_lightning.units import ByteSize, in_words
from tests.benchmarks.heading import ROOT, dated, machine
from tuner.fitting import Fitting
from tuner.objective import Bench, paired_difference
from tuner.scales import scales_in_words
from tuner.search import search
from tuner.settings import parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-budget", default="24GB")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = parse("fit", [], default=ROOT / "configs" / "default.yaml")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    job = settings.job()
    fitting = Fitting(job, ByteSize(arguments.memory_budget))
    with tempfile.TemporaryDirectory() as folder:
        outcome = search(
            job, fitting, Path(folder), settings.tune, on_run=lambda *run: print(*run, flush=True)
        )
    bench = Bench(job)
    runs = {
        finalist.label: [
            bench.run(finalist.plan, num_steps=job.max_steps, seed=seed)
            for seed in range(arguments.seeds)
        ]
        for finalist in outcome.finalists
    }
    reference = runs[outcome.finalists[0].label]
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
        "Validation loss in nats per token. The difference is paired with the first row, same "
        "weights and batches; its interval holds evaluation batches and a seed deviation of 0.01.",
        "",
        "| plan | lr | scale | state of the matrices | "
        + " | ".join(f"seed {seed}" for seed in range(arguments.seeds))
        + " | mean | difference | |",
        "|---|---|---|---|" + "---|" * (arguments.seeds + 3),
    ]
    for finalist in outcome.finalists:
        of_plan = runs[finalist.label]
        plan = finalist.plan
        difference = "0" if of_plan is reference else str(paired_difference(of_plan, reference))
        losses = [run.loss for run in of_plan]
        lines.append(
            f"| {finalist.label} | {plan.lr:g} | {scales_in_words(plan)} | "
            f"{in_words(finalist.state_bytes)} | "
            + " | ".join(f"{loss:.4f}" for loss in losses)
            + f" | {sum(losses) / len(losses):.4f} | {difference} | "
            + ("chosen |" if finalist is outcome.winner else "|")
        )
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.output is not None:
        arguments.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
