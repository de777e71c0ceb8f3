"""The search: learning rate, scales and level together, then levels by matrix, then the finals."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.planning.knobs import Knobs, as_params, suggest
from tuner.planning.planner import DEFAULT_KNOBS, BudgetPlanner
from tuner.planning.scales import ADAM_QK_FACTOR, combine_plans, describe_scales, scale_plan
from tuner.search.finals import decide, race
from tuner.trials.budget import SearchBudget
from tuner.trials.cache import EarlierTrials, job_key, trial_key
from tuner.trials.extrapolation import plan_for_length, predict_full_run
from tuner.trials.results import Candidate, Kind, SearchResult, TrialRecord
from tuner.trials.runner import TrialResult, TrialRunner
from tuner.trials.study import Params, Study, trial_result
from tuner.trials.workers import Worker

# Of the trials, how many look for learning rate, scales and level together; those are one choice
# and matter ten times more than which matrix gets which level (docs/log.md).
UNIFORM_SHARE = 0.7
_WIDEST, _WIDEST_QK = 2.5, 4.0
# The best scale falls with the width of the model, to a sixth at three times the width
# (docs/log.md); that of the settings may be far too large, and never far too small.
_SMALLEST_SCALE = 1 / 10
# Mixed plans may take the bytes of this level at least, where the budget has them: from a level on,
# uniform plans cannot be told apart and the highest may lead, which leaves nothing to distribute.
_LEVEL_OF_MIXED = 2
# The two kinds of plan that beat uniform in the first measurements: q and k at level 0 as long as
# the rest can make up for it, and low levels for early layers (docs/log.md).
_OPENING_KNOBS = (DEFAULT_KNOBS, Knobs(exponent=4.0, depth_slope=-1.0))

_STAGES = {
    "adam": "learning rate and scales of Adam: level 0, the reference",
    "folded": "learning rate, scales and one level for all matrices, from 1",
    "mixed": "what a level costs by role and depth, decoded into a level for every matrix",
    "final": "the best plan of every kind, longer and on other seeds",
}


def search(
    job: Job,
    planner: BudgetPlanner,
    folder: Path,
    search_budget: SearchBudget,
    *,
    memory_options: MemoryOptions | None = None,
    known: EarlierTrials | None = None,
    worker: Worker | None = None,
    on_steps: Callable[[int], None] = lambda _: None,
    on_run: Callable[[str, float], None] = lambda *_: None,
) -> SearchResult:
    """Find the plan for a budget: lr, scales and level first, then which matrix gets which level.

    Calling it again on the same folder takes up where it was left.

    Args:
        job: What to train.
        planner: Its plans that fit the budget; no other is ever run, but for Adam on a proxy model.
        folder: Gets `study.db`.
        search_budget: How much to search.
        memory_options: What runs are made with instead of the memory options of their plans, if
            anything.
        known: Runs that are not done again, and parameters to begin with.
        worker: Who works on it here; by default one that no other worker waits for.
        on_steps: Called with the optimizer steps just done, or found done, for a progress bar.
        on_run: Called after every run with what it was and its loss.

    Raises:
        InfeasibleBudgetError: No plan fits.
        ConfigError: Every run diverged.
        MemoryShortageError: The device has not enough memory, whatever the account said.
    """
    bench = TrialRunner(job, lambda: on_steps(1), memory_options=memory_options)
    studies = [
        Study(folder / "study.db", name, seed=job.seed, worker=worker, about=about)
        for name, about in _STAGES.items()
    ]
    stages = _Search(
        job, planner, studies, search_budget, bench, known or EarlierTrials(), on_steps, on_run
    )
    stages.uniform_stage()
    stages.mixed_stage()
    finalists = stages.finals()
    predict = partial(
        predict_full_run, num_steps=search_budget.final_steps, full_steps=job.trainer.max_steps
    )
    winner, reason = decide(finalists, predict, adam_may_win=planner.adam_may_win)
    return SearchResult(
        winner=winner,
        finalists=finalists,
        trials=stages.trials,
        adam_state_bytes=planner.folded_state_bytes(planner.uniform(0)),
        budget=search_budget,
        reason=reason,
    )


class _Search:
    def __init__(
        self,
        job: Job,
        planner: BudgetPlanner,
        studies: Sequence[Study],
        search_budget: SearchBudget,
        bench: TrialRunner,
        known: EarlierTrials,
        on_steps: Callable[[int], None],
        on_run: Callable[[str, float], None],
    ) -> None:
        self.trials: list[TrialRecord] = []
        self._job = job
        self._job_key = job_key(job)
        self._planner = planner
        self._search_budget = search_budget
        self._bench = bench
        self._runs = dict(known.runs)
        self._known_params = known.params
        self._done_here: set[str] = set()
        self._on_steps = on_steps
        self._on_run = on_run
        self._folded_levels = [level for level in planner.uniform_levels if level]
        self._adam, self._folded, self._mixed, self._final = studies

    # ---- stage 1: learning rate, scales and uniform level are one choice

    def uniform_stage(self) -> None:
        """Look for Adam at its best, and in as many runs for the best folded level."""
        levels = self._folded_levels
        stages: list[tuple[Study, str, list[Params]]] = []
        if 0 in self._planner.uniform_levels:
            stages.append((self._adam, "adam", _adam_openers()))
        if levels:
            stages.append((self._folded, "folded", _folded_openers(levels)))
        for study, name, openers in stages:
            tried = [
                params
                for params in self._known_params.get(name, ())
                if params.get("level", 0) in self._planner.uniform_levels and params not in openers
            ]
            study.search(
                [*openers, *tried],
                num_trials=max(
                    1, round(self._search_budget.num_trials * UNIFORM_SHARE / len(stages))
                ),
                evaluate=partial(self._run_uniform, study is self._folded),
                on_trial=self._note_uniform,
            )

    def _run_uniform(self, is_folded: bool, trial: optuna.Trial) -> TrialResult:
        if is_folded:
            trial.suggest_int("level", self._folded_levels[0], self._folded_levels[-1])
        trial.suggest_float("lr_factor", 1 / _WIDEST, _WIDEST, log=True)
        trial.suggest_float("scale_factor", _SMALLEST_SCALE, _WIDEST, log=True)
        trial.suggest_float("qk_factor", 1 / _WIDEST_QK, _WIDEST_QK, log=True)
        return self._short(trial, self._uniform_plan(trial.params))

    def _note_uniform(self, trial: FrozenTrial) -> None:
        plan = self._uniform_plan(trial.params)
        level, scales = trial.params.get("level", 0), describe_scales(plan)
        self._note("uniform", f"uniform level {level}, lr {plan.lr:g}, scale {scales}", trial, plan)

    def _uniform_plan(self, params: Params) -> FoldPlan:
        factors = {name: value for name, value in params.items() if name != "level"}
        return scale_plan(self._planner.uniform(params.get("level", 0)), **factors)

    # ---- stage 2: which matrix gets which level

    def mixed_stage(self) -> None:
        """Look for levels by matrix that beat one level for all."""
        if self._folded.best() is None:
            return
        num_uniform = len(self._adam.finished()) + len(self._folded.finished())
        self._mixed.search(
            [as_params(knobs) for knobs in _OPENING_KNOBS],
            num_trials=max(1, self._search_budget.num_trials - num_uniform),
            evaluate=lambda trial: self._short(trial, self._mixed_plan(suggest(trial))),
            on_trial=lambda trial: self._note(
                "mixed",
                f"mixed {sum(run.stage == 'mixed' for run in self.trials)}",
                trial,
                self._mixed_plan(Knobs(**trial.params)),
            ),
        )

    def _mixed_plan(self, knobs: Knobs) -> FoldPlan:
        base = self._best(self._folded)
        assert base is not None
        # The budget binds between two uniform levels: then mixed plans may use what is left.
        level = self._level_of_mixed(base)
        binds = not self._planner.adam_may_win and level == self._folded_levels[0]
        room = (
            self._planner.max_state_bytes
            if binds
            else self._planner.folded_state_bytes(self._planner.uniform(level))
        )
        adam = self._best(self._adam) or self._planner.uniform(0)
        return combine_plans(self._planner.levels_for(knobs, room), unfolded=adam, folded=base)

    def _level_of_mixed(self, base: FoldPlan) -> int:
        """Give the uniform level whose bytes mixed plans share, for the best uniform plan."""
        return min(_level_of(base), max(self._folded_levels[0], _LEVEL_OF_MIXED))

    # ---- the finals: longer runs on other seeds

    def finals(self) -> list[Candidate]:
        """Race the best of every kind."""
        finalists = list(self._finalists())
        if not any(self._planner.adam_may_win or c.kind != "reference" for c in finalists):
            lr = self._planner.module.settings.lr
            raise ConfigError(f"every short run diverged; lower model.lr, now {lr:g}")
        found = race(finalists, self._final_runs, self._search_budget.num_seeds)
        return [c for c in found if c.runs]

    def _finalists(self) -> list[Candidate]:
        plans: list[tuple[Kind, str, FoldPlan]] = []
        if (adam := self._best(self._adam)) is not None:
            plans.append(("reference", "split-lr Adam", adam))
            # Short runs rank the settings of Adam wrongly (docs/log.md), so two of them race.
            second = self._best(self._adam, lambda trial: self._uniform_plan(trial.params) != adam)
            if second is not None:
                plans.append(("reference", "split-lr Adam (second)", second))
        if (uniform := self._best(self._folded)) is not None:
            level = _level_of(uniform)
            plans.append(("uniform", f"uniform level {level}", uniform))
            # Mixed plans need a uniform one at their bytes and one at half of them beside them.
            of_mixed = self._level_of_mixed(uniform)
            other = level + 1 if level == of_mixed else of_mixed
            if other in self._folded_levels:
                tried = self._best(self._folded, lambda trial: trial.params["level"] == other)
                untried = replace(uniform, levels=dict.fromkeys(uniform.levels, other))
                plans.append(("uniform", f"uniform level {other}", tried or untried))
        if (mixed := self._mixed.best()) is not None:
            plan = self._mixed_plan(Knobs(**mixed.params))
            levels = set(plan.levels.values())
            if len(levels) > 1:
                plans.append(("mixed", f"mixed levels {min(levels)}-{max(levels)}", plan))
        return [
            Candidate(
                kind,
                label,
                plan,
                self._planner.folded_state_bytes(plan),
                is_configured=self._is_configured(plan),
            )
            for kind, label, plan in plans
        ]

    def _final_runs(self, racing: Sequence[Candidate], number: int) -> list[TrialResult]:
        steps, seed = self._search_budget.final_steps, self._job.seed + 1 + number
        keys = {self._key(c.plan, steps, seed): c for c in racing}

        def on_run(key: str, run: TrialResult) -> None:
            self._count(key, steps)
            self._on_run(f"final, seed {seed}: {keys[key].label}", run.loss)

        runs = self._final.do(
            list(keys), lambda key: self._run(key, keys[key].plan, steps, seed), on_run
        )
        return [runs[self._key(c.plan, steps, seed)] for c in racing]

    # ---- shared

    def _short(self, trial: optuna.Trial, plan: FoldPlan) -> TrialResult:
        key = self._short_key(plan)
        trial.set_user_attr("run", key)
        trial.set_user_attr("job", self._job_key)
        trial.set_user_attr("plan", plan.to_json())
        return self._run(key, plan, self._search_budget.steps, self._job.seed)

    def _short_key(self, plan: FoldPlan) -> str:
        return self._key(plan, self._search_budget.steps, self._job.seed)

    def _key(self, plan: FoldPlan, num_steps: int, seed: int) -> str:
        as_run = plan_for_length(plan, num_steps, self._job.trainer.max_steps)
        return trial_key(self._job_key, as_run, num_steps=num_steps, seed=seed)

    def _run(self, key: str, plan: FoldPlan, num_steps: int, seed: int) -> TrialResult:
        if key not in self._runs:
            as_run = plan_for_length(plan, num_steps, self._job.trainer.max_steps)
            self._runs[key] = self._bench.run(as_run, num_steps=num_steps, seed=seed)
            self._done_here.add(key)
        return self._runs[key]

    def _count(self, key: str, num_steps: int) -> None:
        """Let the progress bar know of steps that were not done here and now."""
        if key not in self._done_here:
            self._on_steps(num_steps)
        self._done_here.discard(key)

    def _best(
        self, study: Study, where: Callable[[FrozenTrial], bool] = lambda _: True
    ) -> FoldPlan | None:
        trial = study.best(where)
        return None if trial is None else self._uniform_plan(trial.params)

    def _note(self, stage: str, description: str, trial: FrozenTrial, plan: FoldPlan) -> None:
        run = trial_result(trial)
        key = self._short_key(plan)
        self._runs[key] = run
        self._count(key, self._search_budget.steps)
        state_bytes = self._planner.folded_state_bytes(plan)
        self.trials.append(
            TrialRecord(stage, description, plan, run, state_bytes, self._is_configured(plan))
        )
        self._on_run(description, run.loss)

    def _is_configured(self, plan: FoldPlan) -> bool:
        asked = self._planner.uniform(_level_of(plan))
        return plan in (asked, scale_plan(asked))  # the latter is rounded


def _level_of(uniform: FoldPlan) -> int:
    return next(iter(uniform.levels.values()))


def _adam_openers() -> list[Params]:
    """List where Adam is at its best for all that is known, so that the reference is a fair one.

    It wants smaller steps than the settings of folded levels give it, and the more so the wider the
    model is (docs/log.md).
    """
    return [
        _point(qk_factor=ADAM_QK_FACTOR),
        _point(lr_factor=0.5, qk_factor=ADAM_QK_FACTOR),
        _point(scale_factor=0.5, qk_factor=ADAM_QK_FACTOR),
        _point(scale_factor=0.2, qk_factor=ADAM_QK_FACTOR),
    ]


def _folded_openers(levels: Sequence[int]) -> list[Params]:
    """List the lowest level as configured, and the second at a lower rate and at a lower scale."""
    second = levels[:2][-1]
    return [
        _point(level=levels[0]),
        _point(level=second, lr_factor=0.6),
        _point(level=second, scale_factor=0.4),
    ]


def _point(**factors: float) -> Params:
    return {"lr_factor": 1.0, "scale_factor": 1.0, "qk_factor": 1.0, **factors}
