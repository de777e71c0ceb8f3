"""The search over a bench that answers at once: which plans it asks for, and how it resumes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.memory.account import Accountant
from foam_lightning.model.roles import role_of
from foam_lightning.plan import FoldPlan
from tuner.planning.planner import BudgetPlanner
from tuner.search import search as searching
from tuner.search.search import search
from tuner.trials.budget import SearchBudget
from tuner.trials.cache import EarlierTrials, job_key, load_earlier_trials
from tuner.trials.extrapolation import plan_for_length
from tuner.trials.results import Kind, SearchResult
from tuner.trials.runner import TrialResult

STEPS, SEEDS = 6, 2


class KilledError(Exception):
    pass


class TrialRunner:
    """Answer what a plan loses from the plan alone: level 2, lr .03 and scale .2 are best."""

    def __init__(self) -> None:
        self.runs: list[tuple[FoldPlan, int]] = []
        self.seeds: list[int] = []
        self.best_level, self.loss_per_level = 2, 0.3
        self.adam_diverges = 0  # so many of the first runs of Adam
        self.all_diverge = False
        self.killed_at: int | None = None

    def run(self, plan: FoldPlan, *, num_steps: int, seed: int) -> TrialResult:
        if len(self.runs) == self.killed_at:
            raise KilledError
        self.runs.append((plan, num_steps))
        self.seeds.append(seed)
        levels = plan.levels.values()
        off = sum(abs(level - self.best_level) for level in levels) / len(levels)
        scale = sum(plan.scales.values()) / len(levels)
        loss = (
            3
            + self.loss_per_level * off
            + math.log(plan.lr / 0.03) ** 2
            + math.log(scale / 0.2) ** 2
        )
        if set(levels) == {0} and len(self.of_adam()) <= self.adam_diverges:
            loss = math.nan
        if self.all_diverge:
            loss = math.nan
        return TrialResult([loss * 8] * 3, [8] * 3)

    def of_adam(self) -> list[FoldPlan]:
        return [plan for plan, _ in self.runs if set(plan.levels.values()) == {0}]

    def mixed(self) -> list[FoldPlan]:
        """List the mixed plans of the short runs, which are as long as the full run here."""
        return [
            plan
            for plan, steps in self.runs
            if len(set(plan.levels.values())) > 1 and steps == STEPS
        ]


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> TrialRunner:
    made = TrialRunner()
    monkeypatch.setattr(searching, "TrialRunner", lambda job, on_step, memory_options: made)
    return made


@pytest.fixture(scope="module")
def job(new_job: Callable[..., Job]) -> Job:
    return new_job(trainer={"max_steps": STEPS})


@pytest.fixture(scope="module")
def accountant(job: Job) -> Accountant:
    return job.new_accountant()


@pytest.fixture
def planner(job: Job, accountant: Accountant) -> BudgetPlanner:
    found = BudgetPlanner(job, 24 * 10**9)
    found.accountant = accountant
    return found


@pytest.fixture
def without_adam(job: Job, accountant: Accountant) -> BudgetPlanner:
    """One byte less than level 0 needs at the memory options it would have."""
    roomy = BudgetPlanner(job, 24 * 10**9)
    roomy.accountant = accountant
    found = BudgetPlanner(job, accountant.account(roomy.uniform(0)).peak_bytes - 1)
    found.accountant = accountant
    found.__dict__["memory_options"] = roomy.memory_options
    assert found.uniform_levels[0] == 1
    return found


def run_search(
    planner: BudgetPlanner, folder: Path, trials: int = 12, known: EarlierTrials | None = None
) -> SearchResult:
    return search(planner.job, planner, folder, SearchBudget(trials, STEPS, SEEDS), known=known)


def finalist(search_result: SearchResult, kind: Kind) -> FoldPlan:
    return next(c.plan for c in search_result.finalists if c.kind == kind)


def by_role(plan: FoldPlan) -> dict[str, float]:
    return {role_of(name): scale for name, scale in plan.scales.items()}


@pytest.mark.parametrize("trials", [4, 5, 12])
def test_adam_gets_exactly_as_many_runs_as_folded_levels(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner, trials: int
) -> None:
    search_result = run_search(planner, tmp_path, trials)
    levels = [set(plan.levels.values()) for plan, steps in bench.runs if steps == STEPS]
    num_adam = levels.count({0})
    uniform = [run.level for run in search_result.trials if run.stage == "uniform"]
    assert num_adam == uniform.count(0) == round(trials * searching.UNIFORM_SHARE / 2)
    assert len(uniform) == 2 * num_adam
    assert len(search_result.trials) == trials


def test_adam_opens_at_its_best_known_points(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    run_search(planner, tmp_path)
    lr, scale = (getattr(planner.module.settings, key) for key in ("lr", "unfolded_scale"))
    found = [(plan.lr, by_role(plan)) for plan in bench.of_adam()[:4]]
    for (rate, scales), (rate_factor, rest, qk) in zip(
        found, [(1, 1, 2.5), (0.5, 1, 2.5), (1, 0.5, 1.25), (1, 0.2, 0.5)], strict=True
    ):
        assert rate == pytest.approx(lr * rate_factor)
        for role, of_role in scales.items():
            assert of_role == pytest.approx(scale * (qk if role in ("q", "k") else rest))


def test_without_adam_all_its_runs_go_to_folded_levels(
    tmp_path: Path, without_adam: BudgetPlanner, bench: TrialRunner
) -> None:
    search_result = run_search(without_adam, tmp_path)
    assert not bench.of_adam()
    assert sum(run.stage == "uniform" for run in search_result.trials) == 8
    assert len(search_result.trials) == 12


def test_a_mixed_plan_takes_the_steps_of_adam_at_level_0_but_for_q_and_k_and_else_of_the_uniform(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    search_result = run_search(planner, tmp_path)
    base, adam = finalist(search_result, "uniform"), finalist(search_result, "reference")
    assert by_role(adam)["q"] != by_role(adam)["v"]
    plans = bench.mixed()
    assert any(0 in plan.levels.values() for plan in plans)
    for plan in plans:
        assert plan.lr == base.lr
        for name, level in plan.levels.items():
            of_folded = level > 0 or role_of(name) in ("q", "k")
            step = base.lr * base.scales[name] if of_folded else adam.lr * adam.scales[name]
            assert plan.lr * plan.scales[name] == pytest.approx(step, rel=5.1e-3)


def test_the_first_mixed_plan_keeps_q_and_k_at_level_0_and_folds_the_rest(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    bench.best_level = 1  # whose bytes leave something for the rest
    search_result = run_search(planner, tmp_path)
    base = next(c for c in search_result.finalists if c.kind == "uniform")
    first = bench.mixed()[0]
    assert planner.folded_state_bytes(first) <= base.state_bytes
    for name, level in first.levels.items():
        assert (level == 0) == (role_of(name) in ("q", "k"))


def test_a_mixed_plan_where_adam_does_not_fit_takes_the_scales_that_it_is_known_to_want(
    tmp_path: Path, without_adam: BudgetPlanner, bench: TrialRunner
) -> None:
    bench.best_level = 1
    base = finalist(run_search(without_adam, tmp_path, trials=4), "uniform")
    first = bench.mixed()[0]
    lr, scale = (getattr(without_adam.module.settings, key) for key in ("lr", "unfolded_scale"))
    steps = {
        role_of(name): first.lr * first.scales[name]
        for name, level in first.levels.items()
        if not level
    }
    assert "q" in steps
    for role, step in steps.items():
        of_folded = base.lr * by_role(base)[role]
        known = of_folded if role in ("q", "k") else lr * scale
        assert step == pytest.approx(known, rel=5.1e-3)


def test_mixed_plans_are_tried_where_adam_leads_every_uniform_level(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    bench.best_level, bench.loss_per_level = 0, 3.0
    search_result = run_search(planner, tmp_path)
    assert bench.mixed()
    assert search_result.winner.kind == "reference"


def test_finalists_run_on_other_seeds_and_the_beaten_drop_out(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    seed = planner.job.seed
    search_result = run_search(planner, tmp_path)
    finals = [s for s, (_, steps) in zip(bench.seeds, bench.runs, strict=True) if steps > STEPS]
    assert finals.count(seed + 1) == len(search_result.finalists) > finals.count(seed + 2)
    numbers = {c.label: len(c.runs) for c in search_result.finalists}
    assert numbers[search_result.winner.label] == max(numbers.values())
    assert {s for s in bench.seeds if s not in finals} == {seed}
    assert len(numbers) == len(search_result.finalists)


def test_longer_runs_take_the_learning_rate_of_their_length(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    search_result = run_search(planner, tmp_path)
    winner = search_result.winner.plan
    of_winner = {
        steps: plan.lr
        for plan, steps in bench.runs
        if (plan.levels, plan.scales) == (winner.levels, winner.scales)
    }
    assert of_winner[STEPS] == winner.lr  # the length of the full run
    assert of_winner[2 * STEPS] == plan_for_length(winner, 2 * STEPS, STEPS).lr < winner.lr


def test_the_two_best_adams_race(tmp_path: Path, planner: BudgetPlanner) -> None:
    search_result = run_search(planner, tmp_path)
    of_adam = [run for run in search_result.trials if run.level == 0]
    best = sorted(of_adam, key=lambda run: run.run.loss)[:2]
    found = [c.plan for c in search_result.finalists if c.kind == "reference"]
    assert found == [run.plan for run in best]
    assert found[0] != found[1]


def test_a_run_says_whether_it_is_as_configured(tmp_path: Path, planner: BudgetPlanner) -> None:
    search_result = run_search(planner, tmp_path)
    uniform = [run for run in search_result.trials if run.level is not None]
    asked = [run.plan == planner.uniform(run.level or 0) for run in uniform]
    assert [run.is_configured for run in uniform] == asked
    assert any(asked)


def test_a_search_of_the_same_job_finds_every_run_done(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = run_search(planner, tmp_path / "first")
    bench.runs = []
    known = load_earlier_trials([tmp_path / "first" / "study.db"], job_key(planner.job))
    assert run_search(planner, tmp_path / "second", known=known) == first
    assert not bench.runs


def test_a_smaller_budget_begins_with_the_trials_that_fit_it(
    tmp_path: Path, planner: BudgetPlanner, without_adam: BudgetPlanner, bench: TrialRunner
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    bench.best_level = 1
    run_search(planner, tmp_path / "first")
    levels = [set(plan.levels.values()) for plan, steps in bench.runs if steps == STEPS]
    num_folded = sum(len(of_plan) == 1 and of_plan != {0} for of_plan in levels)
    bench.runs = []
    known = load_earlier_trials([tmp_path / "first" / "study.db"], job_key(planner.job))
    search_result = run_search(without_adam, tmp_path / "second", known=known)
    uniform = sum(run.stage == "uniform" for run in search_result.trials)
    again = [plan for plan, n in bench.runs if n == STEPS and len(set(plan.levels.values())) == 1]
    assert num_folded == 4
    assert len(again) == uniform - num_folded


@pytest.mark.parametrize("best_level", [1, 2, 5, 8])
def test_mixed_plans_have_a_quarter_of_adam_or_more_and_a_uniform_one_of_their_bytes_races(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner, best_level: int
) -> None:
    bench.best_level, bench.loss_per_level = best_level, 1.0
    search_result = run_search(planner, tmp_path)
    found = [
        set(c.plan.levels.values()).pop() for c in search_result.finalists if c.kind == "uniform"
    ]
    room = planner.folded_state_bytes(planner.uniform(min(found[0], 2)))
    assert bench.mixed()
    assert all(0.9 * room < planner.folded_state_bytes(plan) <= room for plan in bench.mixed())
    assert found[1] == (found[0] + 1 if found[0] <= 2 else 2)


def test_the_untried_half_takes_the_steps_of_the_best_uniform(
    tmp_path: Path, planner: BudgetPlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "UNIFORM_SHARE", 2 / 12)  # folded level 1 only
    search_result = run_search(planner, tmp_path)
    base, half = (c.plan for c in search_result.finalists if c.kind == "uniform")
    assert (set(base.levels.values()), set(half.levels.values())) == ({1}, {2})
    assert (half.lr, half.scales) == (base.lr, base.scales)


def test_if_every_run_of_adam_diverges_the_search_goes_on_without_it(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    bench.adam_diverges = 99
    search_result = run_search(planner, tmp_path)
    assert "reference" not in {c.kind for c in search_result.finalists}
    assert bench.mixed()


def test_if_every_run_diverges_the_error_says_what_to_lower(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner
) -> None:
    bench.all_diverge = True
    with pytest.raises(ConfigError, match=r"every short run diverged; lower model\.lr, now 0\.01$"):
        run_search(planner, tmp_path)


@pytest.mark.parametrize("kills", [[1], [2, 0, 9]])
def test_a_search_that_was_killed_runs_the_plans_of_one_that_was_not(
    tmp_path: Path, planner: BudgetPlanner, bench: TrialRunner, kills: list[int]
) -> None:
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    undisturbed = run_search(planner, tmp_path / "calm")
    calm, bench.runs = bench.runs, []
    done = []
    for number in kills:
        bench.killed_at = number
        with pytest.raises(KilledError):
            run_search(planner, tmp_path / "killed")
        done += bench.runs
        bench.runs = []
    bench.killed_at = None
    assert run_search(planner, tmp_path / "killed") == undisturbed
    assert done + bench.runs == calm


@pytest.mark.parametrize("kind", ["files", "validation_files"])
@pytest.mark.parametrize("within", [False, True], ids=["alone", "among sources"])
def test_a_job_is_another_once_its_text_has_changed(
    tmp_path: Path, job: Job, kind: str, within: bool
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one")
    source = {kind: [str(path)]}
    changed = replace(job, data=replace(job.data, **({"sources": [source]} if within else source)))
    before = job_key(changed)
    assert job_key(changed) == before != job_key(job)
    path.write_text("another")
    assert job_key(changed) != before
