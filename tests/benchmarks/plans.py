"""The smallest budgets of the LLaMA sizes, by the account: no GPU is needed and none was used.

    python -m tests.benchmarks.plans [--output FILE]

Every lever is pulled (chunked loss, one sequence at a time, activation checkpointing); Adam, level
2 and level 8 differ in nothing but the fold level. The recipes are those of `configs/`: bfloat16
weights, gradients and state, rows of 256 tokens.
"""

import argparse
import datetime
from pathlib import Path

from foam_lightning.memory.levers import leanest
from foam_lightning.training import versions
from foam_lightning.units import in_words
from tests.benchmarks.heading import ROOT, commit
from tuner.settings import parse

SIZES = ("60m", "130m", "350m", "1b", "3b", "7b", "13b")
LEVELS = (0, 2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = versions()
    lines = [
        "# The smallest budget of each LLaMA",
        "",
        "- command: `python -m tests.benchmarks.plans`",
        f"- commit {commit()}, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, no seed involved",
        f"- predicted for a GPU, on a CPU: torch {found['torch']}, "
        f"transformers {found['transformers']}; context and margin are defaults, not measured",
        "",
        "| model | weights | state, Adam | state, level 2 | peak, Adam | peak, level 2 | "
        "peak, level 8 | largest term at level 8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        job = parse("plan", [], default=ROOT / "configs" / f"llama_{size}.yaml").job()
        module, accountant = job.new_module(), job.new_accountant()
        accounts = [
            min(
                (
                    accountant.account(module.uniform_plan(level, levers))
                    for levers in leanest(job.levers)[-2:]
                ),
                key=lambda account: account.peak_bytes,
            )
            for level in LEVELS
        ]
        adam, folded, highest = accounts
        lines.append(
            f"| {size} | {in_words(adam.breakdown['weights'])} | "
            f"{in_words(adam.breakdown['optimizer_state'])} | "
            f"{in_words(folded.breakdown['optimizer_state'])} | {in_words(adam.peak_bytes)} | "
            f"{in_words(folded.peak_bytes)} | {in_words(highest.peak_bytes)} | "
            f"{highest.binding.replace('_', ' ')} |"
        )
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.output is not None:
        arguments.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
