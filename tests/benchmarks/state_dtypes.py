"""What does cheaper state cost? The default job at level 2, one short run for each way to keep it.

    python -m tests.benchmarks.state_dtypes [--steps 300] [--seeds 2] [--output FILE]

Float32 weights with the moments in float32, bfloat16 and int8; then bfloat16 weights, rounded at
random and to the nearest. Same seed, same initial weights, same batches, complete schedules.
"""

import argparse
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from foam_lightning.memory.account import optimizer_state_bytes
from foam_lightning.plan import StateDtype
from foam_lightning.training import versions
from foam_lightning.units import in_words
from tests.benchmarks.heading import ROOT, dated, machine, publish
from tuner.objective import Bench, paired_difference
from tuner.settings import parse

LEVEL = 2
# Name, precision of the run, dtype of the moments, rounding at random.
ROWS: list[tuple[str, str, StateDtype, bool]] = [
    ("float32 weights, float32 state", "32-true", "float32", True),
    ("float32 weights, bfloat16 state", "32-true", "bfloat16", True),
    ("float32 weights, bfloat16 state, to the nearest", "32-true", "bfloat16", False),
    ("float32 weights, int8 state", "32-true", "int8", True),
    ("float32 weights, int8 state, to the nearest", "32-true", "int8", False),
    ("bfloat16 weights and state", "bf16-true", "bfloat16", True),
    ("bfloat16 weights and state, to the nearest", "bf16-true", "bfloat16", False),
    ("bfloat16 weights, int8 state", "bf16-true", "int8", True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = parse("fit", [], default=ROOT / "configs" / "default.yaml")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    base = settings.job()
    lines = [
        "# The default job at level 2, by how weights and state are kept",
        "",
        f"- command: `python -m tests.benchmarks.state_dtypes {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- {arguments.steps} steps, complete schedules, seeds 0 to {arguments.seeds - 1}",
        "",
        "Validation loss in nats per token. The difference is paired with the first row; its "
        "interval holds evaluation batches and a seed deviation of 0.01.",
        "",
        "| weights and state | bytes of state | "
        + " | ".join(f"seed {seed}" for seed in range(arguments.seeds))
        + " | difference |",
        "|---|---|" + "---|" * (arguments.seeds + 1),
    ]
    reference = None
    for name, precision, state_dtype, at_random in ROWS:
        job = replace(
            base,
            model={**base.model, "stochastic_rounding": at_random},
            trainer={**base.trainer, "precision": precision},
        )
        plan = job.plan_at(LEVEL)
        plan = replace(plan, levers=replace(plan.levers, state_dtype=state_dtype))
        bench = Bench(job)
        runs = [
            bench.run(plan, num_steps=arguments.steps, seed=seed) for seed in range(arguments.seeds)
        ]
        reference = reference or runs
        size = optimizer_state_bytes(job.new_module().shapes, plan.levels, state_dtype)
        difference = "0" if runs is reference else str(paired_difference(runs, reference))
        losses = " | ".join(f"{run.loss:.4f}" for run in runs)
        lines.append(f"| {name} | {in_words(size)} | {losses} | {difference} |")
        print(lines[-1], flush=True)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
