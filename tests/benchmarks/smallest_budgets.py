"""The smallest budgets of the LLaMA sizes, by the account: no GPU is needed and none was used.

    python -m tests.benchmarks.smallest_budgets [--output FILE]

Chunked loss and activation checkpointing are on, and either gradients are kept, and the recipe's
512 sequences a step are accumulated one by one, or they are released, and a step is 4 sequences.
Adam, level 2 and level 8 differ in nothing but the fold level. The recipes are those of `configs/`:
bfloat16 weights, gradients and state, rows of 256 tokens.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from foam_lightning.job import Job
from foam_lightning.memory.allocator import set_expandable_segments
from foam_lightning.plan import MemoryOptions
from foam_lightning.units import format_bytes
from tests.benchmarks.heading import ROOT, commit_and_date, packages, publish
from tuner.config.parser import parse

SIZES = ("60m", "130m", "350m", "1b", "3b", "7b", "13b")
LEVELS = (0, 2, 8)
RELEASED_BATCH = 4
HEAD = (
    "| model | weights | state, Adam | state, level 2 | peak, Adam | peak, level 2 | "
    "peak, level 8 | largest term at level 8 |",
    "|---|---|---|---|---|---|---|---|",
)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    set_expandable_segments()
    command = " ".join(["python -m tests.benchmarks.smallest_budgets", *words])
    jobs = {size: load_job(size) for size in arguments.sizes}
    small_jobs = {
        size: replace(job, data=replace(job.data, batch_size=RELEASED_BATCH))
        for size, job in jobs.items()
    }
    lines = [
        "# The smallest budget of each LLaMA",
        "",
        f"- command: `{command}`",
        f"- {commit_and_date()}, no seed involved",
        f"- predicted for a GPU, on a CPU, {packages('torch', 'transformers')}; context is a "
        "default and margin a replay of the allocator with expandable segments, not measured; 2 % "
        "of each peak are kept free",
        "",
        "## Gradients kept, 512 sequences a step",
        "",
        *HEAD,
        *(row(size, job, options(job, 1)) for size, job in jobs.items()),
        "",
        f"## Gradients released, {RELEASED_BATCH} sequences a step",
        "",
        *HEAD,
        *(row(size, job, released(job)) for size, job in small_jobs.items()),
    ]
    publish(lines, arguments.output)


def load_job(size: str) -> Job:
    return parse("plan", [], default=ROOT / "configs" / f"llama_{size}.yaml").job()


def options(job: Job, micro_batch_size: int) -> MemoryOptions:
    return replace(
        job.memory_options,
        micro_batch_size=micro_batch_size,
        accumulate_grad_batches=job.data.batch_size // micro_batch_size,
        chunked_loss=True,
        activation_checkpointing=True,
    )


def released(job: Job) -> MemoryOptions:
    return replace(options(job, job.data.batch_size), gradient_release=True)


def row(size: str, job: Job, memory_options: MemoryOptions) -> str:
    module, accountant = job.new_module(), job.new_accountant()
    adam, folded, highest = (
        accountant.account(module.uniform_plan(level, memory_options)) for level in LEVELS
    )
    found = (
        adam.breakdown["weights"],
        adam.breakdown["optimizer_state"],
        folded.breakdown["optimizer_state"],
        *(account.peak_bytes for account in (adam, folded, highest)),
    )
    cells = " | ".join(map(format_bytes, found))
    return f"| {size} | {cells} | {highest.binding.replace('_', ' ')} |"


if __name__ == "__main__":
    main(sys.argv[1:])
