"""Blocks that share structure, and embedding and head folded: is there loss to gain at no bytes?

    python -m tests.benchmarks.blocks [--model default] [--levels 2 1 3] [--seeds 2] [--output FILE]

The default job, from the same weights on the same batches. First the matrices of the layers with
other blocks than neighbouring columns. Then embedding and head with a level of their own beside
uniform levels of the matrices. Runs are kept beside FILE, as .json: interrupted, it goes on from
them. Delete them after a change of the code.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from foam_lightning.job import Job
from foam_lightning.memory.account import optimizer_state_bytes
from foam_lightning.plan import FoldPlan
from foam_lightning.roles import role_of
from foam_lightning.training import versions
from foam_lightning.units import in_words
from tests.benchmarks.arranged import ArrangedJob, View, in_rows
from tests.benchmarks.heading import dated, machine, publish
from tests.benchmarks.kept_runs import say
from tests.benchmarks.ranking import MODELS, job_of, size_in_words
from tuner.kept import Kept
from tuner.objective import Bench, ShortRun, paired_difference

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = 2  # the uniform level that everything is paired with
UNIFORM = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: What is done.
        level: The level of the matrices of the layers.
        outer: Level and scale of embedding and head, in this order.
        views: The arrangement of matrices whose blocks are not neighbouring columns.
    """

    name: str
    level: int
    outer: tuple[tuple[int, float], tuple[int, float]] = ((0, 1.0), (0, 1.0))
    views: Mapping[str, View] = field(default_factory=dict)

    def plan(self, job: Job) -> FoldPlan:
        """Give the levels and scales of all matrices, embedding and head among them."""
        uniform = job.plan_at(self.level)
        levels, scales = dict(uniform.levels), dict(uniform.scales)
        for name, (level, scale) in zip((EMBEDDING, HEAD), self.outer, strict=True):
            levels[name], scales[name] = level, scale
        return replace(uniform, levels=levels, scales=scales)

    def state_bytes(self, job: Job) -> int:
        """Count the state of all parameters."""
        shapes = {
            name: tuple(in_rows(self.views[name], shape)) if name in self.views else shape
            for name, shape in job.new_module().shapes.items()
        }
        return optimizer_state_bytes(shapes, self.plan(job).levels, job.levers.state_dtype)


# ---- blocks of other elements than neighbouring columns


def by_row(w: Tensor) -> Tensor:
    """Blocks of neighbouring rows, as heads are."""
    return w.T


def by_stride(level: int) -> View:
    """Blocks of columns as far apart as can be."""
    return lambda w: w.unflatten(1, (2**level, -1)).transpose(1, 2)


def by_square(w: Tensor) -> Tensor:
    """Blocks of two rows by two columns, at level 2."""
    rows, columns = w.shape
    return w.view(rows // 2, 2, columns // 2, 2).transpose(1, 2)


def across_row_heads(num_heads: int) -> View:
    """Blocks of the same row of different heads, then of neighbouring columns."""
    return lambda w: w.unflatten(0, (num_heads, -1)).permute(1, 2, 0)


def across_column_heads(num_heads: int) -> View:
    """Blocks of the same column of different heads, then of neighbouring columns."""
    return lambda w: w.unflatten(1, (num_heads, -1)).transpose(1, 2)


def by_rotation(num_heads: int) -> View:
    """Blocks of the two rows that the rotary embedding turns into each other, then of more."""
    return lambda w: w.unflatten(0, (num_heads, 2, -1)).permute(3, 0, 2, 1)


def block_rows(job: Job, levels: Sequence[int]) -> list[Row]:
    """List the rows of the first table; those called "neighbouring columns" are the product's."""
    num_heads = job.model["num_attention_heads"]
    names = job.new_module().foldable

    def of_roles(views: Mapping[str, View]) -> dict[str, View]:
        return {name: views[role_of(name)] for name in names if role_of(name) in views}

    rows, columns = across_row_heads(num_heads), across_column_heads(num_heads)
    found = []
    for level in levels:
        kinds: dict[str, Mapping[str, View]] = {
            "neighbouring columns": {},
            "neighbouring rows": dict.fromkeys(names, by_row),
            "neighbouring rows of q, k": of_roles(dict.fromkeys("qk", by_row)),
            "neighbouring rows of v, o": of_roles(dict.fromkeys("vo", by_row)),
            "same place in different heads": of_roles({**dict.fromkeys("qkv", rows), "o": columns}),
        }
        if level == 1:
            kinds["rotary pairs of q, k"] = of_roles(dict.fromkeys("qk", by_rotation(num_heads)))
        if level == BASE:
            kinds["squares of 2 x 2"] = dict.fromkeys(names, by_square)
            kinds["columns far apart"] = dict.fromkeys(names, by_stride(level))
        found += [Row(name, level, views=views) for name, views in kinds.items()]
    return found


def block_table(job: Job, rows: Sequence[Row], runs: Mapping[int, list[ShortRun]]) -> list[str]:
    """Lay out the first table; `runs` by the identity of the row."""
    lines = _head("blocks", "level", "to neighbouring columns", runs)
    for row in rows:
        same = next(other for other in rows if other.level == row.level and not other.views)
        lines.append(
            f"| {row.name} | {row.level} | {in_words(row.state_bytes(job))} | "
            f"{_losses(runs[id(row)])} | {_against(runs, row, same)} |"
        )
    return lines


# ---- embedding and head


def outer_rows() -> list[Row]:
    """List the rows of the second table; those called "uniform" leave embedding and head whole."""

    def both(level: int, scale: float = 1.0) -> tuple[tuple[int, float], tuple[int, float]]:
        return ((level, scale), (level, scale))

    none = (0, 1.0)
    return [
        *(Row("uniform", level) for level in UNIFORM),
        *(Row("both", BASE, both(level)) for level in (1, 2, 4, 8)),
        *(Row("both", BASE, both(2, scale)) for scale in (0.25, 0.5, 2.0)),
        *(Row("embedding", BASE, ((level, 1.0), none)) for level in (1, 2, 4, 8)),
    ]


def outer_table(job: Job, rows: Sequence[Row], runs: Mapping[int, list[ShortRun]]) -> list[str]:
    """Lay out the second table, every row beside the uniform one next above it in bytes."""
    size = {id(row): row.state_bytes(job) for row in rows}
    uniform = sorted((row for row in rows if row.name == "uniform"), key=lambda r: size[id(r)])
    base = next(row for row in uniform if row.level == BASE)
    lines = _head(
        "folded beside them",
        "level of the matrices | of embedding, head | their scale",
        f"to uniform {BASE} | to uniform at no fewer bytes",
        runs,
    )
    for row in rows:
        above = next(other for other in uniform if size[id(other)] >= size[id(row)])
        levels = ", ".join(str(level) for level, _ in row.outer)
        scales = ", ".join(f"{scale:g}" for _, scale in row.outer)
        beside = "-" if row is above else f"{_against(runs, row, above)} (level {above.level})"
        lines.append(
            f"| {row.name} | {row.level} | {levels} | {scales} | {in_words(size[id(row)])} | "
            f"{_losses(runs[id(row)])} | {_against(runs, row, base)} | {beside} |"
        )
    return lines


# ---- runs


def run_all(
    job: Job, rows: Sequence[Row], num_seeds: int, num_steps: int, kept: Kept
) -> dict[int, list[ShortRun]]:
    """Run every row on every seed; by the identity of the row."""

    def of(row: Row, seed: int) -> ShortRun:
        def measure() -> object:
            arranged = ArrangedJob(
                model={**job.model, "exclude": "^$"},
                data=job.data,
                trainer=job.trainer,
                seed=job.seed,
                views=row.views,
            )
            run = Bench(arranged).run(row.plan(job), num_steps=num_steps, seed=seed)
            say(f"seed {seed}: {row.name}, level {row.level}, {row.outer}: {run.loss:.4f}")
            return {"nats": list(run.nats), "num_tokens": list(run.num_tokens)}

        name = row.name if row.views else "columns"
        key = json.dumps([name, row.level, row.outer, seed, num_steps])
        done = kept.of(key, measure)
        return ShortRun(done["nats"], done["num_tokens"])

    by_seed = [[of(row, seed) for row in rows] for seed in range(num_seeds)]
    return {id(row): list(runs) for row, *runs in zip(rows, *by_seed, strict=True)}


def _head(
    first: str, settings: str, comparisons: str, runs: Mapping[int, list[ShortRun]]
) -> list[str]:
    seeds = " | ".join(f"seed {seed}" for seed in range(len(next(iter(runs.values())))))
    head = f"| {first} | {settings} | state | {seeds} | mean | {comparisons} |"
    return [head, "|" + "---|" * (head.count("|") - 1)]


def _losses(runs: Sequence[ShortRun]) -> str:
    losses = [run.loss for run in runs]
    return " | ".join(f"{loss:.4f}" for loss in (*losses, sum(losses) / len(losses)))


def _against(runs: Mapping[int, list[ShortRun]], one: Row, other: Row) -> str:
    return "-" if one is other else str(paired_difference(runs[id(one)], runs[id(other)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="default")
    parser.add_argument("--levels", type=int, nargs="+", default=[BASE, 1, 3], choices=range(1, 4))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--outer-seeds", type=int, default=1, help="of the second table; 0: none")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    job = job_of(arguments.model)
    kept = Kept(None if arguments.output is None else arguments.output.with_suffix(".json"))
    blocks, outer = block_rows(job, arguments.levels), outer_rows()
    in_blocks = run_all(job, blocks, arguments.seeds, arguments.steps, kept)
    lines = [
        "# Blocks that share structure, and embedding and head folded",
        "",
        f"- command: `python -m tests.benchmarks.blocks {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- the default job with {size_in_words(arguments.model)}, lr {job.model['lr']:g}, "
        f"complete schedules of {arguments.steps} steps, seeds from 0",
        "",
        "Validation loss in nats per token; state of all parameters. A difference is paired, "
        "same weights and batches; its interval holds evaluation batches and a seed deviation "
        "of 0.01. Below zero the row is better.",
        "",
        "## Blocks of other elements",
        "",
        *block_table(job, blocks, in_blocks),
    ]
    if arguments.outer_seeds:
        in_outer = run_all(job, outer, arguments.outer_seeds, arguments.steps, kept)
        lines += [
            "",
            "## Embedding and head",
            "",
            "Scale 1 is the step that both have where they do not fold; the matrices have "
            f"{job.model['scale']:g}. Blocks lie within a token.",
            "",
            *outer_table(job, outer, in_outer),
        ]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
