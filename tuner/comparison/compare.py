"""Compare optimizers on one job, each at the best of several learning rates."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.optim.baselines import (
    OPTIMIZERS,
    check_installed,
    installed_optimizers,
    package_version,
)
from foam_lightning.plan import FoldPlan
from foam_lightning.settings import OptimizerName
from tuner.comparison.profile import OptimizerProfile, profile_optimizers
from tuner.trials.cache import TrialStore, job_key, trial_key
from tuner.trials.runner import Difference, TrialResult, TrialRunner, paired_difference

# The learning rates to try, relative to model.lr, which is FOAM's. Adam with a single one for all
# tensors needs about a tenth: split-lr Adam and FOAM scale that of matrices by 0.1 and 0.25.
_CENTRES = {
    "foam": 1.0,
    "split_adamw": 1.0,
    "galore": 0.5,
    "apollo": 0.5,
    "fira": 0.5,
    "muon": 0.5,
    "adamw": 0.1,
    "adam_mini": 0.1,
    "adamw8bit": 0.1,
}
_FACTOR = 2.0
_FIRST_POWERS = range(-2, 2)  # of the factor
MIN_RATES, MAX_RATES = len(_FIRST_POWERS), 8
_BASELINES = ("adamw", "split_adamw")  # all are compared with the better of them


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    Attributes:
        optimizers: Names from `OPTIMIZERS`.
        steps: Optimizer steps of every run.
        seeds: Seeds on which each optimizer runs at its best learning rate.
    """

    optimizers: Sequence[str]
    steps: int
    seeds: int

    @classmethod
    def parse(cls, names: str | None, steps: int, seeds: int) -> "CompareOptions":
        """Check and parse the options of the command.

        Args:
            names: Optimizers, separated by commas; None takes all that are installed.
            steps: 1 or more; below 300, optimizers may rank differently than in longer runs.
            seeds: 1 or more.

        Raises:
            ConfigError: A number is below 1, or an optimizer is unknown or not installed.
        """
        if steps < 1 or seeds < 1:
            raise ConfigError(f"--steps and --seeds must be 1 or more, got {steps} and {seeds}")
        if names is None:
            return cls(installed_optimizers(), steps, seeds)
        wanted = [name.strip() for name in names.split(",")]
        for name in wanted:
            check_installed(name)
        return cls([name for name in OPTIMIZERS if name in wanted], steps, seeds)

    @property
    def min_runs(self) -> int:
        """The number of runs if no optimizer needs further learning rates."""
        return len(self.optimizers) * (MIN_RATES + self.seeds - 1)


@dataclass(frozen=True)
class OptimizerResult:
    """The runs of one optimizer.

    Attributes:
        name: The optimizer.
        losses: Validation loss on the first seed by learning rate, in ascending order; NaN if the
            run diverged.
        lr: The best learning rate.
        runs: The runs at the best learning rate, one per seed.
        is_at_edge: The best learning rate is the lowest or highest of the `MAX_RATES` tried, so
            the optimum may lie outside.
    """

    name: str
    losses: Mapping[float, float]
    lr: float
    runs: Sequence[TrialResult]
    is_at_edge: bool

    @property
    def loss(self) -> float:
        """Mean validation loss over the seeds, in nats per token; NaN if a run diverged."""
        return math.fsum(run.loss for run in self.runs) / len(self.runs)

    @property
    def has_diverged(self) -> bool:
        """Whether a run at the best learning rate diverged."""
        return not math.isfinite(self.loss)

    def against(self, other: "OptimizerResult") -> Difference | None:
        """Compare with another, seed by seed; None if one of them diverged."""
        if self.has_diverged or other.has_diverged:
            return None
        return paired_difference(self.runs, other.runs)


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
        options: What was compared.
        results: One per optimizer, lowest loss first, diverged ones last.
        profiles: Memory and speed by optimizer.
    """

    options: CompareOptions
    results: Sequence[OptimizerResult]
    profiles: Mapping[str, OptimizerProfile]

    @property
    def baseline(self) -> OptimizerResult | None:
        """The better of adamw and split_adamw; None if both diverged or were left out."""
        found = (r for r in self.results if r.name in _BASELINES and not r.has_diverged)
        return next(found, None)


def compare(
    job: Job,
    options: CompareOptions,
    folder: Path,
    *,
    on_steps: Callable[[int], None] = lambda _: None,
    on_added_run: Callable[[], None] = lambda: None,
    on_run: Callable[[str, float], None] = lambda *_: None,
) -> Comparison:
    """Run every optimizer on the same seeds, initial weights and batches.

    Each optimizer tries `MIN_RATES` learning rates a factor of two apart, and up to `MAX_RATES`
    while the best is the lowest or highest; then its best one on the other seeds. Finished runs
    are kept in `folder`, so an interrupted comparison can be resumed.

    Args:
        job: What to train; FOAM uses its level and scale.
        options: What to compare.
        folder: Where `runs.json` goes; created if missing.
        on_steps: Called with the number of optimizer steps taken, or read from `folder`.
        on_added_run: Called when an optimizer needs a run beyond `CompareOptions.min_runs`.
        on_run: Called with the description and the loss of every run.

    Raises:
        ConfigError: The folder cannot be written, or its `runs.json` has other content.
        MemoryShortageError: The device ran out of memory.
    """
    runners = {name: _new_runner(job, name, lambda: on_steps(1)) for name in options.optimizers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror}; choose another folder with --runs"
        ) from error
    store = TrialStore(folder / "runs.json")
    job_names = {
        name: f"{job_key(runner.job)}, {package_version(name)}"
        for name, (runner, _) in runners.items()
    }

    def run(name: str, lr: float, seed: int) -> TrialResult:
        runner, plan = runners[name][0], replace(runners[name][1], lr=lr)
        steps = options.steps
        key = trial_key(job_names[name], plan, num_steps=steps, seed=seed)
        found = store.get(key)
        if found is None:
            try:
                found = runner.run(plan, num_steps=steps, seed=seed)
            # An SVD of gradients with NaN; torch does not declare this export.
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                found = TrialResult([math.nan], [1])
            store.put(key, {"optimizer": name, "lr": lr, "seed": seed, "steps": steps}, found)
        else:
            on_steps(steps)
        on_run(f"{name}, lr {lr:.3g}, seed {seed}", found.loss)
        return found

    results = [
        _tune_rate(name, job, options.seeds, run, on_added_run) for name in options.optimizers
    ]
    profiles = profile_optimizers(runners, on_steps)
    results.sort(key=lambda result: (result.has_diverged, result.loss))
    return Comparison(options, results, profiles)


def _new_runner(job: Job, name: str, on_step: Callable[[], None]) -> tuple[TrialRunner, FoldPlan]:
    own = replace(job, model=replace(job.model, optimizer=cast(OptimizerName, name)))
    return TrialRunner(own, on_step), own.configured_plan()


def _tune_rate(
    name: str,
    job: Job,
    num_seeds: int,
    run: Callable[[str, float, int], TrialResult],
    on_added_run: Callable[[], None],
) -> OptimizerResult:
    centre = _CENTRES[name] * job.model.lr

    def rate(power: int) -> float:
        return float(f"{centre * _FACTOR**power:.3g}")

    runs = {power: run(name, rate(power), job.seed) for power in _FIRST_POWERS}
    while (power := _next_power(runs)) is not None and len(runs) < MAX_RATES:
        on_added_run()
        runs[power] = run(name, rate(power), job.seed)
    best = _best(runs)
    others = [run(name, rate(best), job.seed + number) for number in range(1, num_seeds)]
    return OptimizerResult(
        name=name,
        losses={rate(power): runs[power].loss for power in sorted(runs)},
        lr=rate(best),
        runs=[runs[best], *others],
        is_at_edge=_next_power(runs) is not None,
    )


def _best(runs: Mapping[int, TrialResult]) -> int:
    """Find the power with the lowest loss; the lowest power if all diverged."""
    losses = {power: run.loss for power, run in runs.items() if math.isfinite(run.loss)}
    return min(losses or runs, key=lambda power: (losses.get(power, 0.0), power))


def _next_power(runs: Mapping[int, TrialResult]) -> int | None:
    """Find the power to try next if the best one is at an edge, else None."""
    best = _best(runs)
    if best == min(runs):
        return best - 1
    return best + 1 if best == max(runs) else None
