"""Compare int8 weights with bfloat16 weights: paired runs of the default job and a larger one.

    python -m tests.benchmarks.int8_weights [--model default larger] [--seeds 3] [--output FILE]

Both round stochastically, release gradients and keep the state in bfloat16; only the storage of the
decoder's matrices differs. Two processes of one thread train at a time. Results are saved in a
folder next to FILE, and an interrupted command goes on from them: delete them after changing the
code.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from foam_lightning.job import Job
from foam_lightning.memory.account import Accountant
from foam_lightning.plan import FoldPlan, WeightsDtype
from foam_lightning.training import versions
from foam_lightning.units import format_bytes
from tests.benchmarks.heading import commit_and_date, machine, publish
from tests.benchmarks.rival_plans import MODELS, Task, make_job, run_tasks
from tuner.report.markdown import markdown_table
from tuner.trials.runner import TrialResult, TrialRunner, paired_difference

WEIGHTS: Mapping[str, WeightsDtype | None] = {"bfloat16": None, "int8": "int8"}
TINY = "tiny"  # a check of this program


def job_of(model: str) -> Job:
    job = make_job("default" if model == TINY else model)
    if model == TINY:
        sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
        job = replace(
            job,
            model=replace(job.model, **sizes),
            data=replace(job.data, sequence_length=32, validation_sequences=16),
        )
    settings = replace(job.model, gradient_release=True, state_dtype="bfloat16")
    data = replace(job.data, micro_batch_size=None)
    return replace(
        job, model=settings, data=data, trainer=job.trainer.replace(precision="bf16-true")
    )


def plans_of(job: Job) -> dict[str, FoldPlan]:
    plan = job.configured_plan()
    return {
        name: replace(plan, memory_options=replace(plan.memory_options, weights_dtype=dtype))
        for name, dtype in WEIGHTS.items()
    }


def run_in_bfloat16(task: Task) -> TrialResult:
    """Run a task in a process of its own."""
    torch.set_num_threads(1)
    plan = FoldPlan.from_json(task.plan)
    return TrialRunner(job_of(task.model)).run(plan, num_steps=task.num_steps, seed=task.seed)


def compare(model: str, steps: int | None, seeds: Sequence[int], path: Path) -> list[str]:
    """Run what is not in the file yet, and lay out a table."""
    job = job_of(model)
    steps = steps or job.trainer.max_steps
    plans = plans_of(job)
    tasks = {
        name: [Task(model, plan.to_json(), steps, seed) for seed in seeds]
        for name, plan in plans.items()
    }
    found = run_tasks(
        [task for of_plan in tasks.values() for task in of_plan], path, run_in_bfloat16
    )
    runs = {name: [found[task] for task in of_plan] for name, of_plan in tasks.items()}
    accountant = job.new_accountant()
    cells = []
    for name, of_plan in runs.items():
        difference = paired_difference(of_plan, runs["bfloat16"])
        losses = [f"{run.loss:.4f}" for run in of_plan]
        gap = "0" if name == "bfloat16" else str(difference)
        cells.append([name, _weights_of(accountant, plans[name]), *losses, gap])
    header = ["weights", "bytes of weights", *(f"seed {seed}" for seed in seeds), "difference"]
    return [f"## {model}, {steps} steps", "", *markdown_table(header, cells).splitlines(), ""]


def _weights_of(accountant: Accountant, plan: FoldPlan) -> str:
    return format_bytes(accountant.tensor_terms(plan)["weights"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*MODELS, TINY], nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="by default those of the job")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args(arguments)
    output: Path | None = asked.output
    folder = output.with_suffix("") if output else Path(tempfile.mkdtemp(prefix="int8_weights-"))
    folder.mkdir(parents=True, exist_ok=True)
    tables = [
        line
        for model in asked.model
        for line in compare(model, asked.steps, range(asked.seeds), folder / "runs.json")
    ]
    lines = [
        "# Int8 weights beside bfloat16 weights",
        "",
        f"- command: `python -m tests.benchmarks.int8_weights {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {commit_and_date()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        "",
        "Validation loss in nats per token, complete schedules, level and rates of the job. The "
        "difference is paired (same weights and batches), with its 95 % interval; below zero int8 "
        "is better.",
        "",
        *tables,
    ]
    publish(lines, output)


if __name__ == "__main__":
    main()
