"""The smallest budgets of the LLaMA sizes, by the account: no GPU is needed and none was used.

    python -m tests.benchmarks.plans [--output FILE]

Chunked loss and activation checkpointing are on, and either gradients are kept, and the recipe's
512 sequences a step are accumulated one by one, or they are released, and a step is 4 sequences.
Adam, level 2 and level 8 differ in nothing but the fold level. The recipes are those of `configs/`:
bfloat16 weights, gradients and state, rows of 256 tokens.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from foam_lightning.job import Job
from foam_lightning.plan import Levers
from foam_lightning.training import versions
from foam_lightning.units import in_words
from tests.benchmarks.heading import ROOT, dated, publish
from tuner.settings import parse

SIZES = ("60m", "130m", "350m", "1b", "3b", "7b", "13b")
LEVELS = (0, 2, 8)
RELEASED_BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = versions()
    lines = [
        "# The smallest budget of each LLaMA",
        "",
        "- command: `python -m tests.benchmarks.plans`",
        f"- {dated()}, no seed involved",
        f"- predicted for a GPU, on a CPU: torch {found['torch']}, "
        f"transformers {found['transformers']}; context is a default and margin a replay of the "
        "allocator, not measured",
        "",
    ]
    jobs = {
        size: parse("plan", [], default=ROOT / "configs" / f"llama_{size}.yaml").job()
        for size in SIZES
    }
    lines += ["## Gradients kept, 512 sequences a step", "", *_HEAD]
    for size, job in jobs.items():
        lines.append(_row(size, job, _saving(job, micro_batch_size=1)))
        print(lines[-1], flush=True)
    lines += ["", f"## Gradients released, {RELEASED_BATCH} sequences a step", "", *_HEAD]
    for size, job in jobs.items():
        few = replace(job, data={**job.data, "batch_size": RELEASED_BATCH})
        lines.append(_row(size, few, _released(few)))
        print(lines[-1], flush=True)
    lines += ["", "## The allocator at level 2, gradients released", "", *_RESERVED_HEAD]
    for size, job in jobs.items():
        lines.append(_reserved(size, replace(job, data={**job.data, "batch_size": RELEASED_BATCH})))
        print(lines[-1], flush=True)
    publish(lines, arguments.output)


_HEAD = (
    "| model | weights | state, Adam | state, level 2 | peak, Adam | peak, level 2 | "
    "peak, level 8 | largest term at level 8 |",
    "|---|---|---|---|---|---|---|---|",
)


_RESERVED_HEAD = (
    "| model | tensors | reserved | with expandable segments |",
    "|---|---|---|---|",
)


def _saving(job: Job, *, micro_batch_size: int) -> Levers:
    return replace(
        job.levers,
        micro_batch_size=micro_batch_size,
        accumulate_grad_batches=job.batch_size // micro_batch_size,
        chunked_loss=True,
        activation_checkpointing=True,
    )


def _released(job: Job) -> Levers:
    return replace(_saving(job, micro_batch_size=job.batch_size), gradient_release=True)


def _reserved(size: str, job: Job) -> str:
    """Say what the replay reserves, beside context and the workspace of cuBLAS."""
    plan = job.new_module().uniform_plan(2, _released(job))
    accountant = job.new_accountant()
    fixed, growing = (accountant.usage(plan, expandable=grows) for grows in (False, True))
    found = (fixed.requested, fixed.reserved, growing.reserved)
    return f"| {size} | {' | '.join(map(in_words, found))} |"


def _row(size: str, job: Job, levers: Levers) -> str:
    module, accountant = job.new_module(), job.new_accountant()
    adam, folded, highest = (
        accountant.account(module.uniform_plan(level, levers)) for level in LEVELS
    )
    return (
        f"| {size} | {in_words(adam.breakdown['weights'])} | "
        f"{in_words(adam.breakdown['optimizer_state'])} | "
        f"{in_words(folded.breakdown['optimizer_state'])} | {in_words(adam.peak_bytes)} | "
        f"{in_words(folded.peak_bytes)} | {in_words(highest.peak_bytes)} | "
        f"{highest.binding.replace('_', ' ')} |"
    )


if __name__ == "__main__":
    main()
