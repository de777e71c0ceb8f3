"""Does a short run order plans as a long one does? Twenty plans, two models, everything paired.

    python -m tests.benchmarks.ranking [--model default] [--seeds 2] [--output FILE] [--kept RUNS]

Every plan trains from the same weights on the same batches, once for each length, with complete
schedules. Lr and scales are those of the log for the size of the model: lr .02, scale .25 where
matrices fold, .1 at level 0 and 2.5 times that for q and k, or a quarter of it all at the larger
size; but for the rows that say otherwise. Plans of a share of Adam's state fill it by the knobs of
the search; "random" ones by knobs drawn at random. Two processes of one thread each
train. Runs are kept in RUNS, by default beside FILE as .json: interrupted, it goes on from them,
and with other lengths or more seeds it adds to them. Delete them after a change of the code. The
picture comes beside FILE too, as .png.
"""

import argparse
import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import track

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.roles import ROLES, role_of
from foam_lightning.training import versions
from tests.benchmarks.heading import ROOT, dated, machine, publish
from tests.benchmarks.ranking_page import Entry, RankingPage
from tuner.fitting import UNTUNED, Fitting
from tuner.horizon import at_length
from tuner.kept import KeptRuns
from tuner.objective import Bench, ShortRun
from tuner.scales import turned
from tuner.settings import parse
from tuner.space import Knobs

MODELS: dict[str, dict[str, int | float]] = {
    "default": {},
    # The best scales fall faster than the width rises, the best rate with the length (docs/log.md).
    "larger": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "lr": 0.01,
        "scale": 0.06,
        "unfolded_scale": 0.03,
    },
}
# A run of the larger model takes three times as long: plans that say least of the tuner stay out.
_LEFT_OUT = {
    "larger": {
        "split-lr Adam, lr x 2, scale / 2",
        "uniform level 2, published lr .01",
        "down low",
        "q, k low, 0.5 of Adam",
        "q, k low, 0.125 of Adam",
        "random 2",
    }
}
ADAM = "split-lr Adam"
BASE = "uniform level 2"
# Random plans draw log-uniform multipliers of roles and depth up to this; wider ones put half of
# the matrices at level 0 and the rest at 8.
_SPREAD = math.log(3.0)
ALIKE = replace(UNTUNED, q=1.0, k=1.0)
BY_HAND = {
    "q, k low": UNTUNED,
    "v, o low": replace(ALIKE, v=8.0, o=8.0),
    "down low": replace(ALIKE, down=8.0),
    "early low": replace(ALIKE, depth_slope=-1.0),
    "late low": replace(ALIKE, depth_slope=1.0),
}
# By kind of plan: the mark, and a colour that the colour-blind can tell from the others.
_MARKS = {"Adam": ("s", "#D55E00"), "uniform": ("o", "#0072B2"), "mixed": ("D", "#E69F00")}


@dataclass(frozen=True)
class Row:
    """One plan.

    Attributes:
        name: What it is.
        share: Its part of Adam's state of the matrices, as it was asked for.
        plan: The plan.
        is_folded: Whether it shares lr and rule of the scales with the other folded plans.
    """

    name: str
    share: float
    plan: FoldPlan
    is_folded: bool = True


@dataclass(frozen=True)
class Task:
    """One run."""

    model: str
    plan: str
    num_steps: int
    seed: int

    @property
    def key(self) -> str:
        text = json.dumps([self.model, self.plan, self.num_steps, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_of(model: str) -> Job:
    """Make the default job with a model of this size."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    job = parse("fit", [], default=ROOT / "configs" / "default.yaml").job()
    return replace(job, model={**job.model, **MODELS[model]})


def rows_of(job: Job) -> list[Row]:
    """List the plans; the first three are Adam."""
    fitting = Fitting(job, sys.maxsize)
    adam = fitting.uniform(0)

    def decoded(name: str, level: int, knobs: Knobs) -> Row:
        uniform = fitting.uniform(level)
        levels = fitting.decoded(knobs, fitting.folded_bytes(uniform))
        scales = {
            n: uniform.scales[n] if levels[n] or role_of(n) in ("q", "k") else adam.scales[n]
            for n in levels
        }
        return Row(name, 0.5**level, replace(uniform, levels=levels, scales=scales))

    def randomly(number: int, level: int) -> Row:
        draw = np.random.default_rng(number).uniform(-_SPREAD, _SPREAD, 9)
        roles = dict(zip(ROLES, np.exp(draw[:7]).tolist(), strict=True))
        slope, curvature = draw[7:].tolist()
        knobs = replace(ALIKE, **roles, depth_slope=slope, depth_curvature=curvature)
        return decoded(f"random {number}", level, knobs)

    return [
        Row(ADAM, 1, adam, is_folded=False),
        Row(f"{ADAM}, q, k at .25", 1, turned(adam, qk_factor=2.5), is_folded=False),
        Row(
            f"{ADAM}, lr x 2, scale / 2",
            1,
            turned(adam, lr_factor=2.0, scale_factor=0.5),
            is_folded=False,
        ),
        Row(
            "uniform level 2, published lr .01",
            0.25,
            replace(fitting.uniform(2), lr=0.01),
            is_folded=False,
        ),
        *(Row(f"uniform level {n}", 0.5**n, fitting.uniform(n)) for n in (1, 2, 3, 8)),
        *(decoded(name, 2, knobs) for name, knobs in BY_HAND.items()),
        *(decoded(f"q, k low, {0.5**level:g} of Adam", level, UNTUNED) for level in (1, 3)),
        *(randomly(n, level) for n, level in enumerate((2, 2, 2, 1, 3))),
    ]


def one_run(task: Task) -> ShortRun:
    """Train by a plan on a seed."""
    torch.set_num_threads(1)
    plan = FoldPlan.from_json(task.plan)
    return Bench(job_of(task.model)).run(plan, num_steps=task.num_steps, seed=task.seed)


def plans_of(model: str) -> list[Row]:
    """List the plans that a model of this size is tried with."""
    left_out = _LEFT_OUT.get(model, set())
    return [row for row in rows_of(job_of(model)) if row.name not in left_out]


def runs_of(tasks: Sequence[Task], kept: Path | None) -> dict[Task, ShortRun]:
    """Do the runs that are not kept yet, two at a time, and give all."""
    runs = KeptRuns(kept)
    missing = [task for task in tasks if runs.get(task.key) is None]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        futures = {processes.submit(one_run, task): task for task in missing}
        for future in track(as_completed(futures), "training", total=len(missing)):
            runs.put(futures[future].key, {}, future.result())
    return {task: run for task in tasks if (run := runs.get(task.key)) is not None}


def levels_in_words(plan: FoldPlan) -> str:
    """Say the levels by role, from the first layer to the last; roles alike share a place."""
    by_role: dict[str, list[int]] = {}
    for name, level in plan.levels.items():
        by_role.setdefault(role_of(name), []).append(level)
    if len(set(plan.levels.values())) == 1:
        return f"all {next(iter(plan.levels.values()))}"
    roles_of: dict[str, list[str]] = {}
    for role, levels in by_role.items():
        roles_of.setdefault(" ".join(map(str, levels)), []).append(role)
    return "; ".join(f"{', '.join(roles)}: {levels}" for levels, roles in roles_of.items())


def entries_of(
    model: str,
    lengths: Sequence[int],
    num_seeds: int,
    kept: Path | None,
    *,
    corrected: bool = False,
) -> list[Entry]:
    """Do what runs are missing and give every plan with its runs.

    Args:
        model: One of `MODELS`.
        lengths: Optimizer steps.
        num_seeds: Seeds from 0.
        kept: Where runs are kept.
        corrected: Whether shorter runs take the learning rate of their length.
    """
    job = job_of(model)
    fitting, rows = Fitting(job, sys.maxsize), plans_of(model)

    def task(row: Row, length: int, seed: int) -> Task:
        plan = at_length(row.plan, length, max(lengths)) if corrected else row.plan
        return Task(model, plan.to_json(), length, seed)

    seeds = range(num_seeds)
    runs = runs_of([task(row, n, seed) for seed in seeds for n in lengths for row in rows], kept)
    return [
        Entry(
            name=row.name,
            kind=_kind(row.plan),
            levels=levels_in_words(row.plan),
            lr=row.plan.lr,
            state_bytes=fitting.folded_bytes(row.plan),
            is_quarter=row.share == 0.25,
            is_folded=row.is_folded,
            runs={n: [runs[task(row, n, seed)] for seed in seeds] for n in sorted(lengths)},
        )
        for row in rows
    ]


def _kind(plan: FoldPlan) -> str:
    levels = set(plan.levels.values())
    return "mixed" if len(levels) > 1 else "uniform" if levels != {0} else "Adam"


def draw(page: RankingPage, path: Path) -> None:
    """Draw short losses against long ones, means of the seeds, one point a plan."""
    figure = Figure(figsize=(4.2 * len(page.short_lengths), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    long = page.losses[page.long_length].mean(axis=0)
    panels = figure.subplots(1, len(page.short_lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, page.short_lengths, strict=True):
        short = page.losses[length].mean(axis=0)
        for kind, (mark, colour) in _MARKS.items():
            of_kind = [entry.kind == kind for entry in page.entries]
            axes.plot(short[of_kind], long[of_kind], mark, color=colour, label=kind, alpha=0.8)
        axes.set_xlabel(f"validation loss after {length} steps, nats per token")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"after {page.long_length} steps")
    panels[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="default")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[150, 300, 1200])
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="shorter runs take the learning rate of their length",
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kept", type=Path)
    arguments = parser.parse_args()
    output: Path | None = arguments.output
    kept = arguments.kept or (output and output.with_suffix(".json"))
    lengths = sorted(arguments.lengths)
    entries = entries_of(
        arguments.model, lengths, arguments.seeds, kept, corrected=arguments.corrected
    )
    page = RankingPage(entries, BASE)
    lines = [
        f"# Short runs against long ones, the {arguments.model} model",
        "",
        f"- command: `python -m tests.benchmarks.ranking {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {dated()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- the default job with {size_in_words(arguments.model)}, complete schedules of "
        f"{', '.join(map(str, lengths))} steps, seeds 0 to {arguments.seeds - 1}"
        + (
            "; shorter runs at the learning rate of their length (`tuner/horizon.py`): that of the "
            f"table is the rate at {lengths[-1]}"
            if arguments.corrected
            else ""
        ),
        "",
        "Validation loss in nats per token; below zero a difference is for the better. +- is the "
        "paired 95 % interval of the tuner. Intervals in brackets, 95 % too, are drawn with "
        "replacement over plans and, where there is a mean of seeds, over seeds; two seeds are few "
        "to draw from. Folded plans share lr and the rule of the scales; a quarter is that of "
        "Adam's state. What the tuner does is to order plans by seed 0.",
        "",
    ]
    if output is not None:
        picture = output.with_suffix(".png")
        draw(page, picture)
        lines.append(f"![Short losses against long ones]({picture.name})")
    publish([*lines, *page.lines()], output)


def size_in_words(model: str) -> str:
    """Say what tells the models apart."""
    settings = job_of(model).model
    names = {"hidden_size": "hidden", "num_hidden_layers": "layers"}
    return ", ".join(f"{words} {settings[name]}" for name, words in names.items())


if __name__ == "__main__":
    main()
