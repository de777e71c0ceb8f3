"""The search: learning rate, scales and level together, then a level per matrix, then finals."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from foam_lightning.errors import ConfigError
from foam_lightning.plan import FoldPlan
from tuner.planning.knobs import Knobs, suggest
from tuner.planning.levels import DEFAULT_KNOBS
from tuner.planning.planner import BudgetPlanner
from tuner.planning.scales import ADAM_QK_FACTOR, combine_plans, describe_scales, scale_plan
from tuner.search.finals import decide, run_finals
from tuner.trials.budget import SearchBudget
from tuner.trials.cache import CachedRunner
from tuner.trials.extrapolation import predict_full_run
from tuner.trials.results import Candidate, Kind, SearchResult, TrialRecord
from tuner.trials.runner import TrialResult
from tuner.trials.study import Params, Study, trial_result
from tuner.trials.workers import Worker

# Share of the trials that look for learning rate, scales and level together. These depend on each
# other and matter ten times more than which matrix has which level (docs/log.md).
UNIFORM_SHARE = 0.7
_MAX_FACTOR, _MAX_QK_FACTOR = 2.5, 4.0
# The best scale falls with the width of the model, to a sixth at three times the width
# (docs/log.md): the scale of the settings may be far too large, but never far too small.
_MIN_SCALE_FACTOR = 1 / 10
# Mixed plans may use at least the bytes of this level, if the budget has them. Higher uniform
# levels hardly differ in loss, and the best may be the highest, which leaves nothing to distribute.
_LEVEL_OF_MIXED = 2
# The two kinds of mixed plans that were better than uniform ones in the first measurements: q and
# k at level 0 as long as the rest can make up for it, and low levels in early layers (docs/log.md).
_OPENING_KNOBS = (DEFAULT_KNOBS, Knobs(exponent=4.0, depth_slope=-1.0))

_STAGES = {
    "adam": "learning rate and scales of Adam: level 0, the reference",
    "folded": "learning rate, scales and one level for all matrices, from 1",
    "mixed": "damage of a level by role and depth, decoded into a level for every matrix",
    "final": "the best plan of every kind, in longer runs on other seeds",
}


def search(
    planner: BudgetPlanner,
    runner: CachedRunner,
    folder: Path,
    search_budget: SearchBudget,
    worker: Worker | None = None,
) -> SearchResult:
    """Find the plan for a budget: lr, scales and level first, then a level for every matrix.

    Calling it again on the same folder resumes.

    Args:
        planner: Plans that fit the budget; no other is run, except for Adam on a proxy model.
        runner: Runs the trials, and knows those of earlier searches.
        folder: Gets `study.db`.
        search_budget: How much to search.
        worker: This process among those that share the search; by default the only one.

    Raises:
        InfeasibleBudgetError: No plan fits.
        ConfigError: Every run diverged.
        MemoryShortageError: A run needs more memory than the device has.
    """
    job = runner.job
    studies = [
        Study(folder / "study.db", name, seed=job.seed, worker=worker, about=about)
        for name, about in _STAGES.items()
    ]
    stages = _Stages(planner, runner, studies, search_budget)
    stages.search_uniform()
    stages.search_mixed()
    finalists = run_finals(stages.finalists(), studies[-1], runner, search_budget)
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


class _Stages:
    """The stages before the finals.

    Attributes:
        trials: The finished short runs, in the order of the studies.
    """

    def __init__(
        self,
        planner: BudgetPlanner,
        runner: CachedRunner,
        studies: Sequence[Study],
        search_budget: SearchBudget,
    ) -> None:
        self.trials: list[TrialRecord] = []
        self._planner = planner
        self._runner = runner
        self._budget = search_budget
        self._folded_levels = [level for level in planner.uniform_levels if level]
        self._adam, self._folded, self._mixed, _ = studies

    # ---- learning rate, scales and uniform level

    def search_uniform(self) -> None:
        """Search for the best settings of Adam and, in as many trials, the best folded level."""
        levels = self._folded_levels
        stages: list[tuple[Study, str, list[Params]]] = []
        if 0 in self._planner.uniform_levels:
            stages.append((self._adam, "adam", _adam_openers()))
        if levels:
            stages.append((self._folded, "folded", _folded_openers(levels)))
        for study, name, openers in stages:
            earlier = [
                params
                for params in self._runner.earlier.params.get(name, ())
                if params.get("level", 0) in self._planner.uniform_levels and params not in openers
            ]
            study.search(
                [*openers, *earlier],
                num_trials=max(1, round(self._budget.num_trials * UNIFORM_SHARE / len(stages))),
                evaluate=partial(self._run_uniform, study is self._folded),
                on_trial=self._record_uniform,
            )

    def _run_uniform(self, is_folded: bool, trial: optuna.Trial) -> TrialResult:
        if is_folded:
            trial.suggest_int("level", self._folded_levels[0], self._folded_levels[-1])
        trial.suggest_float("lr_factor", 1 / _MAX_FACTOR, _MAX_FACTOR, log=True)
        trial.suggest_float("scale_factor", _MIN_SCALE_FACTOR, _MAX_FACTOR, log=True)
        trial.suggest_float("qk_factor", 1 / _MAX_QK_FACTOR, _MAX_QK_FACTOR, log=True)
        return self._run(trial, self._uniform_plan(trial.params))

    def _record_uniform(self, trial: FrozenTrial) -> None:
        plan = self._uniform_plan(trial.params)
        level, scales = trial.params.get("level", 0), describe_scales(plan)
        description = f"uniform level {level}, lr {plan.lr:g}, scale {scales}"
        self._record("uniform", description, trial, plan)

    def _uniform_plan(self, params: Params) -> FoldPlan:
        factors = {name: value for name, value in params.items() if name != "level"}
        return scale_plan(self._planner.uniform(params.get("level", 0)), **factors)

    # ---- a level for every matrix

    def search_mixed(self) -> None:
        """Search for levels by matrix that are better than one level for all."""
        if self._folded.best_trial() is None:
            return
        num_uniform = sum(len(study.finished_trials()) for study in (self._adam, self._folded))
        self._mixed.search(
            [asdict(knobs) for knobs in _OPENING_KNOBS],
            num_trials=max(1, self._budget.num_trials - num_uniform),
            evaluate=lambda trial: self._run(trial, self._mixed_plan(suggest(trial))),
            on_trial=self._record_mixed,
        )

    def _record_mixed(self, trial: FrozenTrial) -> None:
        number = sum(record.stage == "mixed" for record in self.trials)
        plan = self._mixed_plan(Knobs(**trial.params))
        self._record("mixed", f"mixed plan {number}", trial, plan)

    def _mixed_plan(self, knobs: Knobs) -> FoldPlan:
        base = self._best_plan(self._folded)
        assert base is not None
        level = self._level_of_mixed(base)
        # If the budget limits the levels, mixed plans may also use what the lowest one leaves.
        is_limited = not self._planner.adam_may_win and level == self._folded_levels[0]
        room = (
            self._planner.max_state_bytes
            if is_limited
            else self._planner.folded_state_bytes(self._planner.uniform(level))
        )
        adam = self._best_plan(self._adam) or self._planner.uniform(0)
        return combine_plans(self._planner.levels_for(knobs, room), unfolded=adam, folded=base)

    def _level_of_mixed(self, base: FoldPlan) -> int:
        """Return the uniform level whose bytes mixed plans may use, given the best uniform plan."""
        return min(_level_of(base), max(self._folded_levels[0], _LEVEL_OF_MIXED))

    # ---- the finalists

    def finalists(self) -> list[Candidate]:
        """Choose the best plans of every kind.

        Raises:
            ConfigError: Every run diverged.
        """
        chosen = [*self._best_adams(), *self._best_uniforms(), *self._best_mixed()]
        state_bytes, is_configured = self._planner.folded_state_bytes, self._is_configured
        candidates = [
            Candidate(kind, label, plan, state_bytes(plan), is_configured=is_configured(plan))
            for kind, label, plan in chosen
        ]
        if not any(self._planner.adam_may_win or c.kind != "reference" for c in candidates):
            lr = self._planner.module.settings.lr
            raise ConfigError(f"every short run diverged; lower model.lr, now {lr:g}")
        return candidates

    def _best_adams(self) -> list[tuple[Kind, str, FoldPlan]]:
        """Choose two plans of Adam, since short runs rank its settings wrongly (docs/log.md)."""
        adam = self._best_plan(self._adam)
        if adam is None:
            return []
        second = self._best_plan(self._adam, lambda t: self._uniform_plan(t.params) != adam)
        found: list[tuple[Kind, str, FoldPlan]] = [("reference", "split-lr Adam", adam)]
        if second is not None:
            found.append(("reference", "split-lr Adam (second)", second))
        return found

    def _best_uniforms(self) -> list[tuple[Kind, str, FoldPlan]]:
        """Choose the best level and, to compare mixed plans with, one of their bytes or half."""
        best = self._best_plan(self._folded)
        if best is None:
            return []
        level, of_mixed = _level_of(best), self._level_of_mixed(best)
        found: list[tuple[Kind, str, FoldPlan]] = [("uniform", f"uniform level {level}", best)]
        other = level + 1 if level == of_mixed else of_mixed
        if other in self._folded_levels:
            tried = self._best_plan(self._folded, lambda trial: trial.params["level"] == other)
            untried = replace(best, levels=dict.fromkeys(best.levels, other))
            found.append(("uniform", f"uniform level {other}", tried or untried))
        return found

    def _best_mixed(self) -> list[tuple[Kind, str, FoldPlan]]:
        trial = self._mixed.best_trial()
        if trial is None:
            return []
        plan = self._mixed_plan(Knobs(**trial.params))
        low, high = min(plan.levels.values()), max(plan.levels.values())
        return [("mixed", f"mixed levels {low}-{high}", plan)] if low < high else []

    # ---- shared

    def _run(self, trial: optuna.Trial, plan: FoldPlan) -> TrialResult:
        steps, seed = self._budget.steps, self._runner.job.seed
        trial.set_user_attr("run", self._runner.key(plan, steps, seed))
        trial.set_user_attr("job", self._runner.job_key)
        trial.set_user_attr("plan", plan.to_json())
        return self._runner.run(plan, steps, seed)

    def _record(self, stage: str, description: str, trial: FrozenTrial, plan: FoldPlan) -> None:
        result = trial_result(trial)
        state_bytes = self._planner.folded_state_bytes(plan)
        self.trials.append(
            TrialRecord(stage, description, plan, result, state_bytes, self._is_configured(plan))
        )
        self._runner.report(description, plan, self._budget.steps, self._runner.job.seed, result)

    def _best_plan(
        self, study: Study, where: Callable[[FrozenTrial], bool] = lambda _: True
    ) -> FoldPlan | None:
        trial = study.best_trial(where)
        return None if trial is None else self._uniform_plan(trial.params)

    def _is_configured(self, plan: FoldPlan) -> bool:
        configured = self._planner.uniform(_level_of(plan))
        return plan in (configured, scale_plan(configured))  # the latter is rounded


def _level_of(uniform: FoldPlan) -> int:
    return next(iter(uniform.levels.values()))


def _adam_openers() -> list[Params]:
    """Return the best known settings of Adam, so that the reference is a fair one.

    Adam needs smaller steps than the settings of folded levels give it, the more so the wider the
    model is (docs/log.md).
    """
    return [
        _params(qk_factor=ADAM_QK_FACTOR),
        _params(lr_factor=0.5, qk_factor=ADAM_QK_FACTOR),
        _params(scale_factor=0.5, qk_factor=ADAM_QK_FACTOR),
        _params(scale_factor=0.2, qk_factor=ADAM_QK_FACTOR),
    ]


def _folded_openers(levels: Sequence[int]) -> list[Params]:
    """Return the lowest level as configured, then the second with a lower rate or lower scale."""
    second = levels[:2][-1]
    return [
        _params(level=levels[0]),
        _params(level=second, lr_factor=0.6),
        _params(level=second, scale_factor=0.4),
    ]


def _params(**factors: float) -> Params:
    return {"lr_factor": 1.0, "scale_factor": 1.0, "qk_factor": 1.0, **factors}
