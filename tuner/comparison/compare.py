"""compare(): optimizers side by side on one job, each at the best of its own learning rates."""

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
from tuner.comparison.profile import OptimizerProfile, measure
from tuner.trials.cache import TrialStore, job_key, trial_key
from tuner.trials.runner import Difference, TrialResult, TrialRunner, paired_difference

# Where the rates of each are looked for, as a share of model.lr, which is FOAM's: Adam with one
# rate for all tensors wants about a tenth of it, as the scales .25 and .1 beside FOAM's say.
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
_FIRST = range(-2, 2)  # powers of the factor
MOST_RATES = 8
_CONTROLS = ("adamw", "split_adamw")  # whose best is what all are compared with


@dataclass(frozen=True)
class Options:
    """What is compared, and how thoroughly.

    Attributes:
        optimizers: Names of `OPTIMIZERS`.
        steps: Optimizer steps of every run.
        seeds: Seeds on which the best rate of each is run.
    """

    optimizers: Sequence[str]
    steps: int
    seeds: int

    @classmethod
    def of(cls, names: str | None, steps: int, seeds: int) -> "Options":
        """Read the options of the command.

        Args:
            names: Optimizers with commas between them; None takes all that are installed.
            steps: 1 or more; under 300 the order of optimizers is not that of longer runs.
            seeds: 1 or more.

        Raises:
            ConfigError: One of them is out of range, unknown, or not installed.
        """
        if steps < 1 or seeds < 1:
            raise ConfigError(f"--steps {steps} and --seeds {seeds} must be 1 or more")
        if names is None:
            return cls(installed_optimizers(), steps, seeds)
        wanted = [name.strip() for name in names.split(",")]
        for name in wanted:
            check_installed(name)
        return cls([name for name in OPTIMIZERS if name in wanted], steps, seeds)

    @property
    def least_runs(self) -> int:
        """How many runs there are if no grid has to be extended."""
        return len(self.optimizers) * (len(_FIRST) + self.seeds - 1)


@dataclass(frozen=True)
class Contender:
    """One optimizer and its runs.

    Attributes:
        name: Of the optimizer.
        losses: Loss of the first seed by learning rate, lowest rate first; NaN where it diverged.
        lr: The best rate.
        runs: At that rate, one by seed.
        is_at_edge: The best rate is the lowest or highest tried, and the bound on their number
            stopped the search.
    """

    name: str
    losses: Mapping[float, float]
    lr: float
    runs: Sequence[TrialResult]
    is_at_edge: bool

    @property
    def loss(self) -> float:
        """Mean over the seeds; NaN where one diverged."""
        return math.fsum(run.loss for run in self.runs) / len(self.runs)

    @property
    def has_diverged(self) -> bool:
        """Whether a run at the best rate gave no loss."""
        return not math.isfinite(self.loss)

    def against(self, other: "Contender") -> Difference | None:
        """Compare with another, seed by seed; None where one of them diverged."""
        if self.has_diverged or other.has_diverged:
            return None
        return paired_difference(self.runs, other.runs)


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        options: What was asked for.
        contenders: Lowest loss first, diverged ones last.
        footprints: By name.
    """

    options: Options
    contenders: Sequence[Contender]
    profiles: Mapping[str, OptimizerProfile]

    @property
    def control(self) -> Contender | None:
        """The better of adamw and split_adamw; None if neither ran to its end."""
        found = (one for one in self.contenders if one.name in _CONTROLS and not one.has_diverged)
        return next(found, None)


def compare(
    job: Job,
    options: Options,
    folder: Path,
    *,
    on_steps: Callable[[int], None] = lambda _: None,
    on_extended: Callable[[], None] = lambda: None,
    on_run: Callable[[str, float], None] = lambda *_: None,
) -> Comparison:
    """Run every optimizer on the same seeds, initial weights and batches.

    Each takes four learning rates a factor of two apart, and further ones while the best is at an
    edge, eight at most; then its best rate on the other seeds. Calling it again goes on from the
    runs that `folder` keeps.

    Args:
        job: What to train; FOAM at its level and scale.
        options: What to compare.
        folder: Gets `runs.json`; it is made where it is not there.
        on_steps: Called with the number of optimizer steps that were taken, or known before.
        on_extended: Called when a run is added to the `least_runs`.
        on_run: Called with every run, as words, and its loss.

    Raises:
        ConfigError: The folder cannot be written, or holds something else.
        MemoryShortageError: The device has not enough memory.
    """
    benches = {name: _bench_of(job, name, lambda: on_steps(1)) for name in options.optimizers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror}; choose another place with --runs"
        ) from error
    kept = TrialStore(folder / "runs.json")

    def run(name: str, lr: float, seed: int) -> TrialResult:
        bench, plan = benches[name][0], replace(benches[name][1], lr=lr)
        steps = options.steps
        job_name = f"{job_key(bench.job)}, {package_version(name)}"
        key = trial_key(job_name, plan, num_steps=steps, seed=seed)
        found = kept.get(key)
        if found is None:
            try:
                found = bench.run(plan, num_steps=steps, seed=seed)
            # Decomposing gradients that are no numbers any more; torch does not declare its export.
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                found = TrialResult([math.nan], [1])
            about = {"optimizer": name, "lr": lr, "seed": seed, "steps": steps}
            kept.put(key, about, found)
        else:
            on_steps(steps)
        on_run(f"{name}, lr {lr:.3g}, seed {seed}", found.loss)
        return found

    contenders = [
        _contend(name, job, options.seeds, run, on_extended) for name in options.optimizers
    ]
    profiles = measure(benches, on_steps)
    contenders.sort(key=lambda one: (one.has_diverged, one.loss))
    return Comparison(options, contenders, profiles)


def _bench_of(job: Job, name: str, on_step: Callable[[], None]) -> tuple[TrialRunner, FoldPlan]:
    own = replace(job, model=replace(job.model, optimizer=cast(OptimizerName, name)))
    return TrialRunner(own, on_step), own.own_plan()


def _contend(
    name: str,
    job: Job,
    num_seeds: int,
    run: Callable[[str, float, int], TrialResult],
    on_extended: Callable[[], None],
) -> Contender:
    centre = _CENTRES[name] * job.model.lr

    def rate(power: int) -> float:
        return float(f"{centre * _FACTOR**power:.3g}")

    runs = {power: run(name, rate(power), job.seed) for power in _FIRST}
    while (power := _further(runs)) is not None and len(runs) < MOST_RATES:
        on_extended()
        runs[power] = run(name, rate(power), job.seed)
    best = _best(runs)
    others = [run(name, rate(best), job.seed + number) for number in range(1, num_seeds)]
    return Contender(
        name=name,
        losses={rate(power): runs[power].loss for power in sorted(runs)},
        lr=rate(best),
        runs=[runs[best], *others],
        is_at_edge=_further(runs) is not None,
    )


def _best(runs: Mapping[int, TrialResult]) -> int:
    """Find the power of the lowest loss; the lowest power where all diverged."""

    def order(power: int) -> tuple[bool, float, int]:
        loss = runs[power].loss
        return (False, loss, power) if math.isfinite(loss) else (True, 0.0, power)

    return min(runs, key=order)


def _further(runs: Mapping[int, TrialResult]) -> int | None:
    """Find the power to try next, beyond an edge that is the best; None where none is."""
    best = _best(runs)
    if best == min(runs):
        return best - 1
    return best + 1 if best == max(runs) else None
