"""The plans that `tuned` sets a search's winner beside, and their runs: Adam, uniform, random."""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from foam_lightning.job import Job
from foam_lightning.model.roles import ROLES, role_of
from foam_lightning.plan import FoldPlan
from tests.benchmarks.heading import ROOT
from tuner.config.parser import parse
from tuner.planning.knobs import Knobs
from tuner.planning.planner import DEFAULT_KNOBS, BudgetPlanner
from tuner.planning.scales import scale_plan
from tuner.trials.cache import TrialStore
from tuner.trials.runner import TrialResult, TrialRunner

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
# Random plans draw log-uniform multipliers of roles and depth up to this; wider ones put half of
# the matrices at level 0 and the rest at 8.
_SPREAD = math.log(3.0)
ALIKE = replace(DEFAULT_KNOBS, q=1.0, k=1.0)
BY_HAND = {
    "q, k low": DEFAULT_KNOBS,
    "v, o low": replace(ALIKE, v=8.0, o=8.0),
    "down low": replace(ALIKE, down=8.0),
    "early low": replace(ALIKE, depth_slope=-1.0),
    "late low": replace(ALIKE, depth_slope=1.0),
}


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
    return replace(job, model=replace(job.model, **MODELS[model]))


def rows_of(job: Job) -> list[Row]:
    """List the plans; the first three are Adam."""
    planner = BudgetPlanner(job, None)
    adam = planner.uniform(0)

    def levels_at(name: str, level: int, knobs: Knobs) -> Row:
        uniform = planner.uniform(level)
        levels = planner.levels_for(knobs, planner.folded_state_bytes(uniform))
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
        return levels_at(f"random {number}", level, knobs)

    return [
        Row(ADAM, 1, adam, is_folded=False),
        Row(f"{ADAM}, q, k at .25", 1, scale_plan(adam, qk_factor=2.5), is_folded=False),
        Row(
            f"{ADAM}, lr x 2, scale / 2",
            1,
            scale_plan(adam, lr_factor=2.0, scale_factor=0.5),
            is_folded=False,
        ),
        Row(
            "uniform level 2, published lr .01",
            0.25,
            replace(planner.uniform(2), lr=0.01),
            is_folded=False,
        ),
        *(Row(f"uniform level {n}", 0.5**n, planner.uniform(n)) for n in (1, 2, 3, 8)),
        *(levels_at(name, 2, knobs) for name, knobs in BY_HAND.items()),
        *(levels_at(f"q, k low, {0.5**level:g} of Adam", level, DEFAULT_KNOBS) for level in (1, 3)),
        *(randomly(n, level) for n, level in enumerate((2, 2, 2, 1, 3))),
    ]


def one_run(task: Task) -> TrialResult:
    """Train by a plan on a seed."""
    torch.set_num_threads(1)
    plan = FoldPlan.from_json(task.plan)
    return TrialRunner(job_of(task.model)).run(plan, num_steps=task.num_steps, seed=task.seed)


def plans_of(model: str) -> list[Row]:
    """List the plans that a model of this size is tried with."""
    left_out = _LEFT_OUT.get(model, set())
    return [row for row in rows_of(job_of(model)) if row.name not in left_out]


def runs_of(tasks: Sequence[Task], kept: Path | None) -> dict[Task, TrialResult]:
    """Do the runs that are not kept yet, two at a time, and give all."""
    runs = TrialStore(kept)
    missing = [task for task in tasks if runs.get(task.key) is None]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        futures = {processes.submit(one_run, task): task for task in missing}
        for future in track(as_completed(futures), "training", total=len(missing)):
            runs.put(futures[future].key, {}, future.result())
    return {task: run for task in tasks if (run := runs.get(task.key)) is not None}
