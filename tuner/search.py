"""The search: learning rate, scale and level together, then levels by matrix, then the finals."""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.run_folder import write_json
from tuner.finals import Candidate, Kind, decide
from tuner.fitting import Fitting
from tuner.objective import Bench, ShortRun, paired_difference
from tuner.outcome import Outcome, Searched
from tuner.probe import UpdateProbe
from tuner.scales import ScaleRule, equal_rms, per_level, rms_by_level, rounded, scales_in_words
from tuner.space import Knobs, as_params, suggest
from tuner.study import Params, Study, run_of

# Of the trials, how many look for learning rate, scale and level together; those are one choice
# and matter ten times more than which matrix gets which level (docs/log.md).
UNIFORM_SHARE = 0.7
# A gap between short runs shrinks on longer ones, so finalists run twice as long, on another seed.
FINAL_LENGTH = 2
_WIDEST = 2.5


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How much to search.

    Args:
        trials: Short runs of the search, 4 or more; a handful of finalists runs again.
        steps: Optimizer steps of a short run; under 150, rankings are noise.
        scales: How the levels of a mixed plan get their scales. "per_level": level 0 takes the step
            size that suits Adam, folded levels the scale of the best uniform plan. "equal_rms":
            every level takes steps as large (root mean square) as that plan's; where no run of
            Adam could be measured, as "per_level", which trained better (docs/log.md).
    """

    trials: int = 10
    steps: int = 150
    scales: ScaleRule = "per_level"


def search(
    job: Job,
    fitting: Fitting,
    folder: Path,
    options: TuneOptions,
    *,
    levers: Levers | None = None,
    on_steps: Callable[[int], None] = lambda _: None,
    on_run: Callable[[str, float], None] = lambda *_: None,
) -> Outcome:
    """Find the plan for a budget: lr, scale and level first, then which matrix gets which level.

    Calling it again on the same folder takes up where it was left.

    Args:
        job: What to train.
        fitting: Its plans that fit the budget; no other is ever run.
        folder: Gets `study.db` and `probe.json`.
        options: How much to search.
        levers: What runs are made with instead of the levers of their plans, if anything.
        on_steps: Called with the optimizer steps just done, or found done, for a progress bar.
        on_run: Called after every run with what it was and its loss.

    Raises:
        InfeasibleBudgetError: No plan fits.
        MemoryShortageError: The device has not enough memory, whatever the account said.
    """
    bench = Bench(job, lambda: on_steps(1), levers=levers)
    stages = _Search(job, fitting, folder, options, bench, on_run)
    on_steps(stages.steps_found())
    stages.uniform_stage()
    stages.mixed_stage()
    finalists = stages.finals()
    winner, reason = decide(finalists)
    return Outcome(
        winner=winner,
        finalists=finalists,
        against_winner={
            c.label: paired_difference([c.run], [winner.run]) for c in finalists if c is not winner
        },
        searched=stages.searched,
        update_rms=stages.update_rms,
        scales=scales_in_words(options.scales, measured=bool(stages.level_rms)),
        adam_state_bytes=fitting.folded_bytes(fitting.uniform(0)),
        short_run_steps=options.steps,
        reason=reason,
    )


def num_steps(options: TuneOptions) -> int:
    """Count the optimizer steps of a search, at most four finalists included."""
    return options.trials * options.steps + 4 * FINAL_LENGTH * options.steps


class _Search:
    def __init__(
        self,
        job: Job,
        fitting: Fitting,
        folder: Path,
        options: TuneOptions,
        bench: Bench,
        on_run: Callable[[str, float], None],
    ) -> None:
        self.searched: list[Searched] = []
        self.update_rms: dict[str, dict[int, float]] = {}
        self.level_rms: dict[int, float] = {}
        self._runs: dict[str, ShortRun] = {}
        self._job = job
        self._fitting = fitting
        self._options = options
        self._bench = bench
        self._on_run = on_run
        self._levels = fitting.uniform_levels
        self._probe_file = folder / "probe.json"
        database = folder / "study.db"
        self._uniform = Study(database, "uniform", seed=job.seed)
        self._mixed = Study(database, "mixed", seed=job.seed)
        self._final = Study(database, "final", seed=job.seed)

    def steps_found(self) -> int:
        """Count the optimizer steps that an earlier process has done."""
        short = len(self._uniform.finished()) + len(self._mixed.finished())
        return self._options.steps * (short + FINAL_LENGTH * len(self._final.finished()))

    # ---- stage 1: learning rate, scale and uniform level are one choice

    def uniform_stage(self) -> None:
        openers: list[Params] = []
        if self._levels[0] == 0:
            # Adam prefers a higher lr at a lower scale; both must be there for a fair reference.
            openers += [_point(0), _point(0, lr_factor=2.0, scale_factor=0.5)]
        folded = [level for level in self._levels if level]
        openers += [_point(level) for level in (*folded[:2], *folded[-1:])]
        self._uniform.search(
            openers,
            num_trials=max(1, round(self._options.trials * UNIFORM_SHARE)),
            evaluate=self._run_uniform,
            on_trial=lambda trial: self._note(
                "uniform", _describe_uniform(self._plan_of(trial)), trial, self._plan_of(trial)
            ),
        )
        if self._probe_file.exists():
            rms = json.loads(self._probe_file.read_text(encoding="utf-8"))
            self.update_rms = {
                role: {int(level): value for level, value in by_level.items()}
                for role, by_level in rms.items()
            }
            self.level_rms = rms_by_level(self.update_rms, self._fitting.module.foldable)

    def _run_uniform(self, trial: optuna.Trial) -> ShortRun:
        trial.suggest_categorical("level", self._levels)
        trial.suggest_float("lr_factor", 1 / _WIDEST, _WIDEST, log=True)
        trial.suggest_float("scale_factor", 1 / _WIDEST, _WIDEST, log=True)
        plan = self._plan_of(trial)
        if self._probe_file.exists() or set(plan.levels.values()) != {0}:
            return self._short(plan)
        probe = UpdateProbe(at_step=self._options.steps * 2 // 3)
        run = self._short(plan, probe)
        if math.isfinite(run.loss):  # otherwise another run of Adam may still get through
            write_json(self._probe_file, probe.rms)
        return run

    def _plan_of(self, trial: "optuna.Trial | FrozenTrial") -> FoldPlan:
        level = trial.params["level"]
        plan = self._fitting.uniform(level)
        return replace(
            plan,
            lr=rounded(plan.lr * trial.params["lr_factor"]),
            scales={level: rounded(plan.scales[level] * trial.params["scale_factor"])},
        )

    # ---- stage 2: which matrix gets which level, at the bytes of the best uniform plan

    def mixed_stage(self) -> None:
        best = self._best_uniform(lambda _: True)
        if best is None or self._uniform_level(best) == 0:
            return  # Adam fits and leads: folding some matrices is no way to catch up
        # The two kinds of plan that beat uniform in the first measurements: low levels for q and k,
        # and low levels for early layers (docs/log.md).
        knobs = [Knobs(exponent=4.0, q=4.0, k=4.0), Knobs(exponent=4.0, depth_slope=-1.0)]
        self._mixed.search(
            [as_params(k) for k in knobs],
            num_trials=max(1, self._options.trials - len(self._uniform.finished())),
            evaluate=lambda trial: self._short(self._mixed_plan(suggest(trial))),
            on_trial=lambda trial: self._note(
                "mixed",
                f"mixed {sum(run.stage == 'mixed' for run in self.searched)}",
                trial,
                self._mixed_plan(Knobs(**trial.params)),
            ),
        )

    def _mixed_plan(self, knobs: Knobs) -> FoldPlan:
        base = self._best_uniform(lambda level: level > 0)
        assert base is not None
        level = self._uniform_level(base)
        # The budget binds between two uniform levels: then mixed plans may use what is left.
        binds = level == self._levels[0]
        room = self._fitting.state_allowance if binds else self._fitting.folded_bytes(base)
        levels = self._fitting.decoded(knobs, room)
        return replace(base, levels=levels, scales=self._scales(base, levels.values()))

    # ---- the finals: longer runs on another seed

    def finals(self) -> list[Candidate]:
        plans: list[tuple[Kind, FoldPlan]] = []
        if (adam := self._best_uniform(lambda level: level == 0)) is not None:
            plans.append(("reference", adam))
        if (uniform := self._best_uniform(lambda level: level > 0)) is not None:
            plans.append(("uniform", uniform))
            half = self._uniform_level(uniform) + 1
            if half in self._levels:
                tried = self._best_uniform(lambda level: level == half)
                scales = self._scales(uniform, [half])
                untried = replace(self._fitting.uniform(half), lr=uniform.lr, scales=scales)
                plans.append(("uniform", tried or untried))
        mixed = self._mixed.best()
        if mixed is not None:
            plan = self._mixed_plan(Knobs(**mixed.params))
            if len(set(plan.levels.values())) > 1:
                plans.append(("mixed", plan))
        return [self._final_run(kind, plan) for kind, plan in plans]

    def _final_run(self, kind: Kind, plan: FoldPlan) -> Candidate:
        name = plan.to_json()
        run = self._final.recorded(name)
        if run is None:
            run = self._bench.run(
                plan,
                num_steps=self._options.steps * FINAL_LENGTH,
                seed=self._job.seed + 1,
            )
            self._final.record(name, run)
        candidate = Candidate(kind, plan, run, self._fitting.folded_bytes(plan))
        self._on_run(f"final: {candidate.label}", run.loss)
        return candidate

    # ---- shared

    def _short(self, plan: FoldPlan, *callbacks: UpdateProbe) -> ShortRun:
        known = self._runs.get(plan.to_json())  # different knobs may decode to one plan
        return known or self._bench.run(
            plan, num_steps=self._options.steps, seed=self._job.seed, callbacks=callbacks
        )

    def _scales(self, base: FoldPlan, levels: Collection[int]) -> dict[int, float]:
        """Give levels their scales, at the learning rate and step size of a folded uniform plan."""
        ((base_level, scale),) = base.scales.items()
        if self._options.scales == "equal_rms" and self.level_rms:
            target = scale * self.level_rms[base_level]
            return equal_rms(levels, target=target, rms=self.level_rms)
        # An unfolded matrix keeps the step size that suits Adam, whatever the learning rate is.
        adam = self._best_uniform(lambda level: level == 0) or self._fitting.uniform(0)
        unfolded = rounded(adam.scales[0] * adam.lr / base.lr)
        return per_level(levels, unfolded=unfolded, folded=scale)

    def _best_uniform(self, wanted: Callable[[int], bool]) -> FoldPlan | None:
        trial = self._uniform.best(lambda t: wanted(t.params["level"]))
        return None if trial is None else self._plan_of(trial)

    def _uniform_level(self, plan: FoldPlan) -> int:
        return next(iter(plan.levels.values()))

    def _note(self, stage: str, description: str, trial: FrozenTrial, plan: FoldPlan) -> None:
        run = run_of(trial)
        loss = run.loss
        self._runs[plan.to_json()] = run
        levels = set(plan.levels.values())
        self.searched.append(
            Searched(
                stage,
                description,
                levels.pop() if len(levels) == 1 else None,
                self._fitting.folded_bytes(plan),
                loss if math.isfinite(loss) else None,
            )
        )
        self._on_run(description, loss)


def _point(level: int, *, lr_factor: float = 1.0, scale_factor: float = 1.0) -> Params:
    return {"level": level, "lr_factor": lr_factor, "scale_factor": scale_factor}


def _describe_uniform(plan: FoldPlan) -> str:
    ((level, scale),) = plan.scales.items()
    return f"uniform level {level}, lr {plan.lr:g}, scale {scale:g}"
