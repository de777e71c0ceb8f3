"""The search over a runner that answers at once: which plans it runs, and how it resumes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.model.roles import role_of
from foam_lightning.plan import FoldPlan
from tuner.planning.planner import BudgetPlanner
from tuner.search.search import UNIFORM_SHARE, search
from tuner.trials.budget import SearchBudget
from tuner.trials.cache import CachedRunner, job_key, load_earlier_trials
from tuner.trials.extrapolation import plan_for_length
from tuner.trials.results import Kind, SearchResult
from tuner.trials.runner import TrialResult, TrialRunner

STEPS, SEEDS = 6, 2


class KilledError(Exception):
    pass


class FakeRunner(TrialRunner):
    """Computes the loss from the plan alone: level 2, lr 0.03 and scale 0.2 are best."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.runs: list[tuple[FoldPlan, int]] = []
        self.seeds: list[int] = []
        self.best_level, self.loss_per_level = 2, 0.3
        self.num_diverging_adams = 0  # of the first runs of Adam
        self.all_diverge = False
        self.killed_at: int | None = None

    def run(self, plan: FoldPlan, *, num_steps: int, seed: int, **_: Any) -> TrialResult:
        if len(self.runs) == self.killed_at:
            raise KilledError
        self.runs.append((plan, num_steps))
        self.seeds.append(seed)
        levels = plan.levels.values()
        off = sum(abs(level - self.best_level) for level in levels) / len(levels)
        scale = sum(plan.scales.values()) / len(levels)
        terms = math.log(plan.lr / 0.03) ** 2 + math.log(scale / 0.2) ** 2
        loss = 3 + self.loss_per_level * off + terms
        if set(levels) == {0} and len(self.adams()) <= self.num_diverging_adams:
            loss = math.nan
        if self.all_diverge:
            loss = math.nan
        return TrialResult([loss * 8] * 3, [8] * 3)

    def short_runs(self) -> list[FoldPlan]:
        """List the plans of the short runs, which are as long as the full run here."""
        return [plan for plan, steps in self.runs if steps == STEPS]

    def adams(self) -> list[FoldPlan]:
        return [plan for plan, _ in self.runs if set(plan.levels.values()) == {0}]

    def mixed(self) -> list[FoldPlan]:
        return [plan for plan in self.short_runs() if len(set(plan.levels.values())) > 1]


@pytest.fixture(scope="module")
def job(new_job: Callable[..., Job]) -> Job:
    return new_job(trainer={"max_steps": STEPS})


@pytest.fixture
def runner(job: Job) -> FakeRunner:
    return FakeRunner(job)


@pytest.fixture(scope="module")
def planner(job: Job) -> BudgetPlanner:
    return BudgetPlanner(job, 24 * 10**9)


@pytest.fixture
def without_adam(planner: BudgetPlanner) -> BudgetPlanner:
    """Make plans for one byte less than level 0 needs with its memory options."""
    found = planner.with_budget(planner.accountant.account(planner.uniform(0)).peak_bytes - 1)
    found.__dict__["memory_options"] = planner.memory_options
    assert found.uniform_levels[0] == 1
    return found


Search = Callable[..., SearchResult]


@pytest.fixture
def run_search(runner: FakeRunner, tmp_path: Path) -> Search:
    def run(
        planner: BudgetPlanner, trials: int = 12, folder: str = "a", earlier: str | None = None
    ) -> SearchResult:
        (tmp_path / folder).mkdir(exist_ok=True)
        databases = [tmp_path / earlier / "study.db"] if earlier else []
        cached = CachedRunner(runner, load_earlier_trials(databases, job_key(planner.job)))
        return search(planner, cached, tmp_path / folder, SearchBudget(trials, STEPS, SEEDS))

    return run


def finalist(search_result: SearchResult, kind: Kind) -> FoldPlan:
    return next(c.plan for c in search_result.finalists if c.kind == kind)


def by_role(plan: FoldPlan) -> dict[str, float]:
    return {role_of(name): scale for name, scale in plan.scales.items()}


@pytest.mark.parametrize("trials", [4, 5, 12])
def test_adam_gets_exactly_as_many_trials_as_folded_levels(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner, trials: int
) -> None:
    search_result = run_search(planner, trials)
    num_adam = [set(plan.levels.values()) for plan in runner.short_runs()].count({0})
    uniform = [trial.level for trial in search_result.trials if trial.stage == "uniform"]
    assert num_adam == uniform.count(0) == round(trials * UNIFORM_SHARE / 2)
    assert len(uniform) == 2 * num_adam
    assert len(search_result.trials) == trials


def test_adam_starts_with_its_best_known_settings(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    run_search(planner)
    settings = planner.module.settings
    lr, scale = settings.lr, settings.unfolded_scale
    found = [(plan.lr, by_role(plan)) for plan in runner.adams()[:4]]
    for (rate, scales), (rate_factor, rest, qk) in zip(
        found, [(1, 1, 2.5), (0.5, 1, 2.5), (1, 0.5, 1.25), (1, 0.2, 0.5)], strict=True
    ):
        assert rate == pytest.approx(lr * rate_factor)
        for role, of_role in scales.items():
            assert of_role == pytest.approx(scale * (qk if role in ("q", "k") else rest))


def test_without_adam_all_its_trials_go_to_folded_levels(
    run_search: Search, without_adam: BudgetPlanner, runner: FakeRunner
) -> None:
    search_result = run_search(without_adam)
    assert not runner.adams()
    assert sum(trial.stage == "uniform" for trial in search_result.trials) == 8
    assert len(search_result.trials) == 12


def test_a_mixed_plan_takes_the_steps_of_adam_at_level_0_but_for_q_and_k(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    search_result = run_search(planner)
    base, adam = finalist(search_result, "uniform"), finalist(search_result, "reference")
    assert by_role(adam)["q"] != by_role(adam)["v"]
    plans = runner.mixed()
    assert any(0 in plan.levels.values() for plan in plans)
    for plan in plans:
        assert plan.lr == base.lr
        for name, level in plan.levels.items():
            is_as_folded = level > 0 or role_of(name) in ("q", "k")
            step = base.lr * base.scales[name] if is_as_folded else adam.lr * adam.scales[name]
            assert plan.lr * plan.scales[name] == pytest.approx(step, rel=5.1e-3)


def test_the_first_mixed_plan_keeps_q_and_k_at_level_0_and_folds_the_rest(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    runner.best_level = 1  # whose bytes leave something for the rest
    search_result = run_search(planner)
    base = next(c for c in search_result.finalists if c.kind == "uniform")
    first = runner.mixed()[0]
    assert planner.folded_state_bytes(first) <= base.state_bytes
    for name, level in first.levels.items():
        assert (level == 0) == (role_of(name) in ("q", "k"))


def test_without_adam_a_mixed_plan_takes_the_configured_scales_of_level_0(
    run_search: Search, without_adam: BudgetPlanner, runner: FakeRunner
) -> None:
    runner.best_level = 1
    base = finalist(run_search(without_adam, trials=4), "uniform")
    first = runner.mixed()[0]
    settings = without_adam.module.settings
    unfolded = {role_of(name): name for name, level in first.levels.items() if not level}
    assert "q" in unfolded
    for role, name in unfolded.items():
        configured = settings.lr * settings.unfolded_scale
        expected = base.lr * by_role(base)[role] if role in ("q", "k") else configured
        assert first.lr * first.scales[name] == pytest.approx(expected, rel=5.1e-3)


def test_finalists_run_on_other_seeds_and_those_clearly_worse_drop_out(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    seed = planner.job.seed
    search_result = run_search(planner)
    finals = [s for s, (_, steps) in zip(runner.seeds, runner.runs, strict=True) if steps > STEPS]
    assert finals.count(seed + 1) == len(search_result.finalists) > finals.count(seed + 2)
    num_runs = {c.label: len(c.runs) for c in search_result.finalists}
    assert num_runs[search_result.winner.label] == max(num_runs.values())
    assert {s for s in runner.seeds if s not in finals} == {seed}
    assert len(num_runs) == len(search_result.finalists)


def test_longer_runs_take_the_learning_rate_of_their_length(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    winner = run_search(planner).winner.plan
    rates = {
        steps: plan.lr
        for plan, steps in runner.runs
        if (plan.levels, plan.scales) == (winner.levels, winner.scales)
    }
    assert rates[STEPS] == winner.lr  # the length of the full run
    assert rates[2 * STEPS] == plan_for_length(winner, 2 * STEPS, STEPS).lr < winner.lr


def test_the_two_best_adams_are_finalists(run_search: Search, planner: BudgetPlanner) -> None:
    search_result = run_search(planner)
    adams = [trial for trial in search_result.trials if trial.level == 0]
    best = sorted(adams, key=lambda trial: trial.run.loss)[:2]
    found = [c.plan for c in search_result.finalists if c.kind == "reference"]
    assert found == [trial.plan for trial in best]
    assert found[0] != found[1]


def test_a_trial_says_whether_it_is_as_configured(
    run_search: Search, planner: BudgetPlanner
) -> None:
    trials = run_search(planner).trials
    uniform = [trial for trial in trials if trial.level is not None]
    expected = [trial.plan == planner.uniform(trial.level or 0) for trial in uniform]
    assert [trial.is_configured for trial in uniform] == expected
    assert any(expected)


def test_a_second_search_of_the_same_job_runs_nothing(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    first = run_search(planner, folder="first")
    runner.runs = []
    assert run_search(planner, folder="second", earlier="first") == first
    assert not runner.runs


def test_a_smaller_budget_starts_with_the_earlier_trials_that_fit_it(
    run_search: Search, planner: BudgetPlanner, without_adam: BudgetPlanner, runner: FakeRunner
) -> None:
    runner.best_level = 1
    run_search(planner, folder="first")
    levels = [set(plan.levels.values()) for plan in runner.short_runs()]
    num_folded = sum(len(of_plan) == 1 and of_plan != {0} for of_plan in levels)
    runner.runs = []
    search_result = run_search(without_adam, folder="second", earlier="first")
    num_uniform = sum(trial.stage == "uniform" for trial in search_result.trials)
    again = [plan for plan in runner.short_runs() if len(set(plan.levels.values())) == 1]
    assert num_folded == 4
    assert len(again) == num_uniform - num_folded


@pytest.mark.parametrize("best_level", [1, 2, 5, 8])
def test_a_uniform_plan_of_the_bytes_of_mixed_plans_is_a_finalist(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner, best_level: int
) -> None:
    runner.best_level, runner.loss_per_level = best_level, 1.0
    finalists = run_search(planner).finalists
    levels = [set(c.plan.levels.values()).pop() for c in finalists if c.kind == "uniform"]
    room = planner.folded_state_bytes(planner.uniform(min(levels[0], 2)))
    assert runner.mixed()
    assert all(0.9 * room < planner.folded_state_bytes(plan) <= room for plan in runner.mixed())
    assert levels[1] == (levels[0] + 1 if levels[0] <= 2 else 2)


def test_an_untried_finalist_takes_the_steps_of_the_best_uniform_plan(
    run_search: Search, planner: BudgetPlanner
) -> None:
    finalists = run_search(planner, trials=4).finalists  # one of them folded, at level 1
    base, half = (c.plan for c in finalists if c.kind == "uniform")
    assert (set(base.levels.values()), set(half.levels.values())) == ({1}, {2})
    assert (half.lr, half.scales) == (base.lr, base.scales)


def test_if_every_run_of_adam_diverges_the_search_continues_without_it(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    runner.num_diverging_adams = 99
    assert "reference" not in {c.kind for c in run_search(planner).finalists}
    assert runner.mixed()


def test_if_every_run_diverges_the_error_says_what_to_lower(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    runner.all_diverge = True
    with pytest.raises(ConfigError, match=r"lower model\.lr, now 0\.01"):
        run_search(planner)


def test_a_search_that_was_killed_runs_the_plans_of_one_that_was_not(
    run_search: Search, planner: BudgetPlanner, runner: FakeRunner
) -> None:
    undisturbed = run_search(planner, folder="undisturbed")
    expected, runner.runs = runner.runs, []
    done = []
    for number in (2, 0, 9):
        runner.killed_at = number
        with pytest.raises(KilledError):
            run_search(planner, folder="killed")
        done += runner.runs
        runner.runs = []
    runner.killed_at = None
    assert run_search(planner, folder="killed") == undisturbed
    assert done + runner.runs == expected


@pytest.mark.parametrize("kind", ["files", "validation_files"])
@pytest.mark.parametrize("is_source", [False, True], ids=["alone", "among sources"])
def test_a_job_is_another_once_its_text_has_changed(
    tmp_path: Path, job: Job, kind: str, is_source: bool
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one")
    source = {kind: [str(path)]}
    changed = replace(
        job, data=replace(job.data, **({"sources": [source]} if is_source else source))
    )
    before = job_key(changed)
    assert job_key(changed) == before != job_key(job)
    path.write_text("another")
    assert job_key(changed) != before
