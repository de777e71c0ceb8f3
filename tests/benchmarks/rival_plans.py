"""The plans that `tuned` compares a winner with (Adam, uniform, random), and their runs."""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
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
from tuner.planning.levels import DEFAULT_KNOBS
from tuner.planning.planner import BudgetPlanner
from tuner.planning.scales import scale_plan
from tuner.trials.cache import TrialStore
from tuner.trials.runner import TrialResult, TrialRunner

MODELS: dict[str, dict[str, int | float]] = {
    "default": {},
    # The best scales fall faster than the width grows, the best rate with the length (docs/log.md).
    "larger": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "lr": 0.01,
        "scale": 0.06,
        "unfolded_scale": 0.03,
    },
}
# A run of the larger model takes three times as long, so the least informative plans are left out.
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
# Random plans have log-uniform multipliers of roles and depth up to 3; larger ones would put half
# of the matrices at level 0 and the rest at 8.
_MAX_LOG_MULTIPLIER = math.log(3.0)
EQUAL_ROLES = replace(DEFAULT_KNOBS, q=1.0, k=1.0)
BY_HAND = {
    "q, k low": DEFAULT_KNOBS,
    "v, o low": replace(EQUAL_ROLES, v=8.0, o=8.0),
    "down low": replace(EQUAL_ROLES, down=8.0),
    "early low": replace(EQUAL_ROLES, depth_slope=-1.0),
    "late low": replace(EQUAL_ROLES, depth_slope=1.0),
}


@dataclass(frozen=True)
class RivalPlan:
    """A plan to compare with.

    Attributes:
        name: Its name in the table.
        share: Its nominal share of Adam's state of the matrices.
        plan: The plan, with the learning rate of the full run.
        is_folded: Whether it has the learning rate and scales of the other folded plans.
    """

    name: str
    share: float
    plan: FoldPlan
    is_folded: bool = True


@dataclass(frozen=True)
class Task:
    """A full run of a plan on a seed."""

    model: str
    plan: str
    num_steps: int
    seed: int

    @property
    def key(self) -> str:
        text = json.dumps([self.model, self.plan, self.num_steps, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_job(model: str) -> Job:
    """Make the default job with a model of this size."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    job = parse("fit", [], default=ROOT / "configs" / "default.yaml").job()
    return replace(job, model=replace(job.model, **MODELS[model]))


def all_rival_plans(job: Job) -> list[RivalPlan]:
    """Make all plans; the first three are Adam."""
    planner = BudgetPlanner(job, None)
    adam = planner.uniform(0)

    def make_mixed(name: str, level: int, knobs: Knobs) -> RivalPlan:
        uniform = planner.uniform(level)
        levels = planner.levels_for(knobs, planner.folded_state_bytes(uniform))
        scales = {
            n: uniform.scales[n] if levels[n] or role_of(n) in ("q", "k") else adam.scales[n]
            for n in levels
        }
        return RivalPlan(name, 0.5**level, replace(uniform, levels=levels, scales=scales))

    def make_random(number: int, level: int) -> RivalPlan:
        draw = np.random.default_rng(number).uniform(-_MAX_LOG_MULTIPLIER, _MAX_LOG_MULTIPLIER, 9)
        roles = dict(zip(ROLES, np.exp(draw[:7]).tolist(), strict=True))
        slope, curvature = draw[7:].tolist()
        knobs = replace(EQUAL_ROLES, **roles, depth_slope=slope, depth_curvature=curvature)
        return make_mixed(f"random {number}", level, knobs)

    return [
        RivalPlan(ADAM, 1, adam, is_folded=False),
        RivalPlan(f"{ADAM}, q, k at .25", 1, scale_plan(adam, qk_factor=2.5), is_folded=False),
        RivalPlan(
            f"{ADAM}, lr x 2, scale / 2",
            1,
            scale_plan(adam, lr_factor=2.0, scale_factor=0.5),
            is_folded=False,
        ),
        RivalPlan(
            "uniform level 2, published lr .01",
            0.25,
            replace(planner.uniform(2), lr=0.01),
            is_folded=False,
        ),
        *(RivalPlan(f"uniform level {n}", 0.5**n, planner.uniform(n)) for n in (1, 2, 3, 8)),
        *(make_mixed(name, 2, knobs) for name, knobs in BY_HAND.items()),
        *(
            make_mixed(f"q, k low, {0.5**level:g} of Adam", level, DEFAULT_KNOBS)
            for level in (1, 3)
        ),
        *(make_random(n, level) for n, level in enumerate((2, 2, 2, 1, 3))),
    ]


def run_task(task: Task) -> TrialResult:
    """Run a task in a process of its own."""
    torch.set_num_threads(1)
    plan = FoldPlan.from_json(task.plan)
    return TrialRunner(make_job(task.model)).run(plan, num_steps=task.num_steps, seed=task.seed)


def rival_plans(model: str) -> list[RivalPlan]:
    """Make the plans for a model of this size."""
    left_out = _LEFT_OUT.get(model, set())
    return [rival for rival in all_rival_plans(make_job(model)) if rival.name not in left_out]


def run_tasks(
    tasks: Sequence[Task], path: Path | None, run: Callable[[Task], TrialResult] = run_task
) -> dict[Task, TrialResult]:
    """Run the tasks whose results are not in the file yet, two at a time; return all results."""
    store = TrialStore(path)
    missing = [task for task in tasks if store.get(task.key) is None]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        futures = {processes.submit(run, task): task for task in missing}
        for future in track(as_completed(futures), "training", total=len(missing)):
            store.put(futures[future].key, {}, future.result())
    return {task: result for task in tasks if (result := store.get(task.key)) is not None}
