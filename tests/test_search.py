"""The search over a bench that answers at once: which plans it asks for, and how it resumes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foam_lightning.job import Job
from foam_lightning.memory.account import Accountant
from foam_lightning.plan import FoldPlan
from foam_lightning.roles import ROLES
from tuner import search as searching
from tuner.fitting import Fitting
from tuner.objective import ShortRun
from tuner.outcome import Outcome
from tuner.scales import ScaleRule, rms_by_level
from tuner.search import TuneOptions, search

STEPS = 6
RMS = {
    role: {level: (0.4 + 0.05 * level) * (2 if role in "qk" else 1) for level in range(9)}
    for role in ROLES
}


class KilledError(Exception):
    pass


class Bench:
    """Answer what a plan loses from the plan alone: level 2, lr .03 and scale .2 are best."""

    def __init__(self) -> None:
        self.runs: list[tuple[FoldPlan, int]] = []
        self.adam_diverges = 0  # so many of the first runs of Adam
        self.killed_at: int | None = None

    def run(self, plan: FoldPlan, *, num_steps: int, seed: int, callbacks: Any = ()) -> ShortRun:
        if len(self.runs) == self.killed_at:
            raise KilledError
        self.runs.append((plan, num_steps))
        for probe in callbacks:
            probe.rms = RMS
        levels = plan.levels.values()
        off = sum(abs(level - 2) for level in levels) / len(levels)
        scale = sum(plan.scales[level] for level in levels) / len(levels)
        loss = 3 + 0.3 * off + math.log(plan.lr / 0.03) ** 2 + math.log(scale / 0.2) ** 2
        if set(levels) == {0} and len(self.of_adam()) <= self.adam_diverges:
            loss = math.nan
        return ShortRun([loss * 8] * 3, [8] * 3)

    def of_adam(self) -> list[FoldPlan]:
        return [plan for plan, _ in self.runs if set(plan.levels.values()) == {0}]

    def mixed(self) -> list[FoldPlan]:
        return [plan for plan, _ in self.runs if len(set(plan.levels.values())) > 1]


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(searching, "Bench", lambda job, on_step: made)
    return made


@pytest.fixture(scope="module")
def job(new_job: Callable[..., Job]) -> Job:
    return new_job()


@pytest.fixture(scope="module")
def accountant(job: Job) -> Accountant:
    return job.new_accountant()


@pytest.fixture
def fitting(job: Job, accountant: Accountant) -> Fitting:
    found = Fitting(job, 24 * 10**9)
    found.accountant = accountant
    return found


@pytest.fixture
def without_adam(job: Job, accountant: Accountant) -> Fitting:
    """One byte less than level 0 needs at the levers it would have."""
    roomy = Fitting(job, 24 * 10**9)
    roomy.accountant = accountant
    found = Fitting(job, accountant.account(roomy.uniform(0)).peak_bytes - 1)
    found.accountant = accountant
    found.__dict__["levers"] = roomy.levers
    assert found.uniform_levels[0] == 1
    return found


def searched(
    fitting: Fitting, folder: Path, rule: ScaleRule = "equal_rms", trials: int = 10
) -> Outcome:
    options = TuneOptions(trials=trials, steps=STEPS, scales=rule)
    return search(fitting.job, fitting, folder, options)


def best_uniform(outcome: Outcome) -> FoldPlan:
    return next(c.plan for c in outcome.finalists if c.kind == "uniform")


def test_equal_rms_gives_every_level_of_a_mixed_plan_steps_of_the_best_uniform_size(
    tmp_path: Path, fitting: Fitting, bench: Bench
) -> None:
    outcome = searched(fitting, tmp_path)
    rms = rms_by_level(RMS, fitting.module.foldable)
    base = best_uniform(outcome)
    ((level, scale),) = base.scales.items()
    plans = bench.mixed()
    assert any(0 in plan.scales for plan in plans)
    for plan in plans:
        assert plan.lr == base.lr
        assert set(plan.scales) == set(plan.levels.values())
        for used, factor in plan.scales.items():
            assert factor * rms[used] == pytest.approx(scale * rms[level], rel=5.1e-3)
    assert "equalise" in outcome.scales


def test_the_untried_half_takes_steps_of_the_best_uniform_size(
    tmp_path: Path, fitting: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "UNIFORM_SHARE", 4 / 10)  # levels 0 (twice), 1 and 2 only
    outcome = searched(fitting, tmp_path)
    rms = rms_by_level(RMS, fitting.module.foldable)
    base, half = (c.plan for c in outcome.finalists if c.kind == "uniform")
    assert (set(base.scales), set(half.scales)) == ({2}, {3})
    assert half.scales[3] * rms[3] == pytest.approx(base.scales[2] * rms[2], rel=5.1e-3)


def test_per_level_gives_level_0_the_step_of_adam_and_the_rest_that_of_the_best_uniform(
    tmp_path: Path, fitting: Fitting, bench: Bench
) -> None:
    outcome = searched(fitting, tmp_path, "per_level")
    base = best_uniform(outcome)
    adam = next(c.plan for c in outcome.finalists if c.kind == "reference")
    ((_, scale),) = base.scales.items()
    plans = bench.mixed()
    assert any(0 in plan.scales for plan in plans)
    for plan in plans:
        for level, factor in plan.scales.items():
            assert factor == pytest.approx(
                scale if level else adam.scales[0] * adam.lr / base.lr, rel=5.1e-3
            )
    assert "per level" in outcome.scales


def test_without_a_run_of_adam_equal_rms_falls_back_and_says_so(
    tmp_path: Path, without_adam: Fitting, bench: Bench
) -> None:
    outcome = searched(without_adam, tmp_path)
    assert not bench.of_adam()
    assert outcome.update_rms == {}
    assert outcome.scales == "So scales are per level, though tune.scales asks for equal_rms."
    base = best_uniform(outcome)
    plans = bench.mixed()
    assert plans
    for plan in plans:
        folded = {factor for level, factor in plan.scales.items() if level}
        assert folded == set(base.scales.values())


def test_a_run_of_adam_that_diverged_is_no_probe_but_the_next_one_is(
    tmp_path: Path, fitting: Fitting, bench: Bench
) -> None:
    bench.adam_diverges = 1
    assert searched(fitting, tmp_path).update_rms == RMS


def test_if_every_run_of_adam_diverges_equal_rms_falls_back_and_says_so(
    tmp_path: Path, fitting: Fitting, bench: Bench
) -> None:
    bench.adam_diverges = 99
    outcome = searched(fitting, tmp_path)
    assert outcome.update_rms == {}
    assert "asks for equal_rms" in outcome.scales
    assert bench.mixed()


@pytest.mark.parametrize("kills", [[1], [2, 0, 9]])
def test_a_search_that_was_killed_runs_the_plans_of_one_that_was_not(
    tmp_path: Path, fitting: Fitting, bench: Bench, kills: list[int]
) -> None:
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    undisturbed = searched(fitting, tmp_path / "calm")
    calm, bench.runs = bench.runs, []
    done = []
    for number in kills:
        bench.killed_at = number
        with pytest.raises(KilledError):
            searched(fitting, tmp_path / "killed")
        done += bench.runs
        bench.runs = []
    bench.killed_at = None
    assert searched(fitting, tmp_path / "killed") == undisturbed
    assert done + bench.runs == calm
